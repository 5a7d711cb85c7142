// Gives the words of Metal's language back to C++, after the kernels.

#undef device
#undef constant
#undef threadgroup
#undef thread
#undef kernel
#undef float2
#undef float4

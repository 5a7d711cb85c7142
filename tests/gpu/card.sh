#!/bin/sh
# Prints the architecture of the first card for CMake, such as 90-real; without one, says so in one line and fails.

PATH=$PATH:/usr/local/nvidia/bin
cap=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d ' .')
case "$cap" in
    '' | *[!0-9]*)
        echo "no NVIDIA card found (nvidia-smi names none): nothing was run; DEVICE=cpu rehearses the same on the CPU" >&2
        exit 1 ;;
esac
echo "$cap-real"

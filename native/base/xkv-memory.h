#pragma once

// gives freed memory back to the system, where the C library keeps it
void xkv_trim();

#pragma once

#include "xkv.h"

// The scope of this thread: contexts that are created inside it keep their KV cache as xkv.

// checks the parameters and reads the sidecar; throws xkv_error
void xkv_scope_open(const xkv_params & params);

void xkv_scope_close();

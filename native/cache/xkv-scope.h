#pragma once

#include "format/xkv-sidecar.h"
#include "store/xkv-config.h"
#include "xkv.h"

#include <initializer_list>
#include <memory>
#include <string>

// The scope of this thread: contexts that are created inside it keep their KV cache as xkv.
struct xkv_scope {
    xkv_config                   config;
    std::shared_ptr<xkv_sidecar> sidecar;
};

// checks the parameters and reads the sidecar; throws xkv_error
void xkv_scope_open(const xkv_params & params);

void xkv_scope_close();

// nullptr outside
const xkv_scope * xkv_scope_now();

// throws xkv_error when it is none of those allowed
ggml_type xkv_check_type(const std::string & name, int32_t type, std::initializer_list<ggml_type> allowed);

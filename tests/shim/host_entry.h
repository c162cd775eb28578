// How Python calls a kernel: a description of its parameters, and a launch with pointers to values.
#pragma once

#include <type_traits>
#include <utility>

#include "host_launch.h"
#include "host_types.h"

namespace shim {

// The name NumPy has for a parameter's type; "any" takes an array of whatever type.
template <typename T>
constexpr const char* type_name() {
    if (std::is_same<T, float>::value) return "float32";
    if (std::is_same<T, double>::value) return "float64";
    if (std::is_same<T, __half>::value) return "float16";
    if (std::is_same<T, __nv_bfloat16>::value) return "bfloat16";
    if (std::is_same<T, bool>::value) return "bool";
    if (std::is_same<T, void>::value || std::is_same<T, uint4>::value) return "any";
    if (std::is_integral<T>::value) {
        constexpr bool is_signed = std::is_signed<T>::value;
        constexpr size_t bytes = sizeof(std::conditional_t<std::is_void<T>::value, char, T>);
        return bytes == 1   ? (is_signed ? "int8" : "uint8")
               : bytes == 2 ? (is_signed ? "int16" : "uint16")
               : bytes == 4 ? (is_signed ? "int32" : "uint32")
                            : (is_signed ? "int64" : "uint64");
    }
    if (std::is_class<T>::value && sizeof(std::conditional_t<std::is_void<T>::value, char, T>) == 128) {
        return "tensor map";
    }
    return "?";
}

template <typename P>
void describe_one(char*& at) {
    using Target = std::remove_pointer_t<P>;
    at += sprintf(at, "%s%s%s;", std::is_const<Target>::value ? "const " : "",
                  type_name<std::remove_cv_t<Target>>(), std::is_pointer<P>::value ? "*" : "");
}

// The parameters of a kernel, one after another: "const bfloat16*;int32;".
template <typename... P>
const char* describe(void (*)(P...)) {
    static char text[64 * 32];
    char* at = text;
    *at = 0;
    (describe_one<P>(at), ...);
    return text;
}

template <typename... P, size_t... I>
const char* launch_entry(
    const char* name, void (*kernel)(P...), const Shape& shape, void** values,
    std::index_sequence<I...>) {
    struct Call {
        void (*kernel)(P...);
        void** values;
    } call = {kernel, values};
    return launch(
        name, shape,
        [](void* p) {
            Call& c = *static_cast<Call*>(p);
            c.kernel(*static_cast<std::remove_cv_t<P>*>(c.values[I])...);
        },
        &call);
}

template <typename... P>
const char* launch_entry(
    const char* name, void (*kernel)(P...), const Shape* shape, void** values) {
    return launch_entry(name, kernel, *shape, values, std::index_sequence_for<P...>());
}

}  // namespace shim

#define SHIM_ENTRY(kernel)                                                                 \
    extern "C" const char* shim_describe_##kernel() { return shim::describe(kernel); }     \
    extern "C" const char* shim_launch_##kernel(const shim::Shape* shape, void** values) { \
        return shim::launch_entry(#kernel, kernel, shape, values);                         \
    }

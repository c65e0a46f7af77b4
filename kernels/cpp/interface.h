// What Python sees of this library, written once: every function with the types of its arguments,
// every struct with its fields. kernels/cpp/build.py reads both from the loaded library.
//
// A function takes pointers ("p"), int64_t ("l") and float ("f"), its number of threads last, and
// returns nothing.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>
#include <vector>

namespace quorum {

template <class A>
constexpr char letter() {
    if constexpr (std::is_pointer_v<A>) return 'p';
    if constexpr (std::is_same_v<A, float>) return 'f';
    static_assert(std::is_pointer_v<A> || std::is_same_v<A, float> || std::is_same_v<A, int64_t>);
    return 'l';
}

// Lines of the interface: "function NAME LETTERS ADDRESS" and
// "struct NAME SIZE FIELD:LETTER:OFFSET ...".
inline std::vector<std::string> &interface_lines() {
    static std::vector<std::string> lines;
    return lines;
}
template <class... A>
bool add_function(const std::string &name, void (*function)(A...)) {
    const std::string letters = {letter<A>()...};
    interface_lines().push_back("function " + name + " " + letters + " " +
                                std::to_string((uintptr_t)function));
    return true;
}
inline bool add_struct(const std::string &name, size_t size, const std::string &fields) {
    interface_lines().push_back("struct " + name + " " + std::to_string(size) + fields);
    return true;
}

#define QUORUM_DECLARE(type, name) type name;
#define QUORUM_DESCRIBE(type, name)                                                                \
    fields += std::string(" " #name ":") + letter<type>() + ":" +                                  \
              std::to_string(offsetof(Described, name));
// A struct of these fields, and what Python builds the same struct from.
#define QUORUM_STRUCT(Name, FIELDS)                                                                \
    struct Name {                                                                                  \
        FIELDS(QUORUM_DECLARE)                                                                     \
        static std::string describe() {                                                            \
            using Described = Name;                                                                \
            std::string fields;                                                                    \
            FIELDS(QUORUM_DESCRIBE)                                                                \
            return fields;                                                                         \
        }                                                                                          \
    }

}  // namespace quorum

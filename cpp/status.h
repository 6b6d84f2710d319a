// Errors without exceptions: kernels run on threads of other runtimes, where nothing may be thrown.
#pragma once
#include <cstdint>
#include <string>
#include <utility>

namespace quark {

/// device: what a GPU or its driver reports.
enum class ErrorKind : uint8_t { none, type, value, memory, unsupported, device };

/// The result of every fallible function of the core. An error's message names the argument, what came and what is
/// allowed.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(ErrorKind kind, std::string message) : kind_(kind), message_(std::move(message)) {}

  bool ok() const { return kind_ == ErrorKind::none; }
  ErrorKind kind() const { return kind_; }
  const std::string& message() const { return message_; }

 private:
  ErrorKind kind_ = ErrorKind::none;
  std::string message_;
};

inline Status type_error(std::string message) { return {ErrorKind::type, std::move(message)}; }
inline Status value_error(std::string message) { return {ErrorKind::value, std::move(message)}; }

}  // namespace quark

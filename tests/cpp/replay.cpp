// Calls that scripts/dump_calls.py recorded, made again: on another processor, or by another compiler, every byte must
// be the same. The file is call after call: a line "operator inputs outputs spec", then for each tensor a line
// "dtype shape" and its elements in row-major order.
//
// usage: replay FILE
#include <fstream>
#include <iostream>
#include <sstream>

#include "arrays.h"
#include "check.h"
#include "ops.h"

namespace {

using arrays::Array;
using arrays::Layout;
using arrays::Shape;
using check::Random;
using quark::DType;

/// A tensor as the file has it.
struct Recorded {
  DType dtype{};
  Shape shape;
  std::vector<unsigned char> bytes;

  int64_t size() const { return quark::bytes_of(dtype); }
  const unsigned char* at(int64_t flat) const { return bytes.data() + flat * size(); }
};

struct Call {
  quark::Op op{};
  std::string text;
  std::vector<Recorded> in, out;
};

bool find(const std::string& name, quark::Op& op) {
  for (int i = 0; i < quark::kOpCount; ++i) {
    op = quark::Op(i);
    if (name == quark::kOps[i].name) return true;
  }
  return false;
}

bool find(const std::string& name, DType& dtype) {
#define QUARK_DTYPE(known, bytes, dlpack, xla) \
  dtype = DType::known;                        \
  if (name == #known) return true;
  QUARK_DTYPES(QUARK_DTYPE)
#undef QUARK_DTYPE
  return false;
}

bool read(std::istream& from, Recorded& t) {
  std::string line, name;
  if (!std::getline(from, line)) return false;
  std::istringstream words(line);
  if (!(words >> name) || !find(name, t.dtype)) return false;
  for (int64_t n = 0; words >> n;) t.shape.push_back(n);
  if (!words.eof() || t.shape.size() > size_t(quark::kMaxRank)) return false;
  t.bytes.resize(size_t(arrays::product(t.shape) * t.size()));
  return bool(from.read(reinterpret_cast<char*>(t.bytes.data()), std::streamsize(t.bytes.size())));
}

/// False where the file isn't what the script wrote.
bool read(std::istream& from, const std::string& line, Call& call) {
  std::istringstream words(line);
  std::string name;
  size_t ins = 0, outs = 0;
  if (!(words >> name >> ins >> outs >> std::ws) || !find(name, call.op)) return false;
  std::getline(words, call.text);
  call.in.resize(ins);
  call.out.resize(outs);
  const auto read_one = [&](Recorded& t) { return read(from, t); };
  return std::all_of(call.in.begin(), call.in.end(), read_one) &&
         std::all_of(call.out.begin(), call.out.end(), read_one);
}

std::string hex(const unsigned char* bytes, int64_t n) {
  std::string text;
  char digits[3];
  while (n-- > 0) {  // the highest first: machines are little-endian
    std::snprintf(digits, sizeof digits, "%02x", bytes[n]);
    text += digits;
  }
  return text;
}

/// The first element that isn't the same.
void compare(const Array& got, const Recorded& want, size_t output) {
  const int64_t size = want.size();
  for (int64_t i = 0; i < got.elements(); ++i) {
    if (std::memcmp(got.at(i), want.at(i), size_t(size)) == 0) continue;
    return check::fail(__FILE__, __LINE__,
                       "output " + std::to_string(output) + ", " + quark::name_of(want.dtype) + " number " +
                           std::to_string(i) + ": " + hex(got.at(i), size) + ", recorded " + hex(want.at(i), size));
  }
}

void replay(const Call& call, Random& random) {
  const check::Note note([&] { return std::string(quark::kOps[int(call.op)].name) + " \"" + call.text + "\""; });
  std::vector<Array> in, out;
  for (const Recorded& t : call.in) {
    in.emplace_back(random, t.dtype, t.shape, random.chance(50) ? Layout::contiguous : Layout::strided);
    for (int64_t i = 0; i < in.back().elements(); ++i) std::memcpy(in.back().at(i), t.at(i), size_t(t.size()));
  }
  for (const Recorded& t : call.out) out.emplace_back(random, t.dtype, t.shape);
  quark::QuantSpec spec;
  quark::Status status = quark::parse_spec(call.text, spec);
  quark::SerialExecutor executor;
  if (status.ok()) status = quark::run(call.op, arrays::views(in), arrays::views(out), spec, executor);
  if (!status.ok()) return check::fail(__FILE__, __LINE__, status.message());
  for (size_t i = 0; i < out.size(); ++i) compare(out[i], call.out[i], i);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: replay FILE\n";
    return 2;
  }
  std::ifstream file(argv[1], std::ios::binary);
  Random random(1);
  int64_t calls = 0;
  for (std::string line; std::getline(file, line); ++calls) {
    Call call;
    if (!read(file, line, call)) {
      std::cerr << "replay: " << argv[1] << ": call " << calls << " isn't one: " << line.substr(0, 200) << '\n';
      return 2;
    }
    replay(call, random);
  }
  const quark::CpuLevel* level = nullptr;
  if (quark::cpu_level(level).ok()) std::cout << level->name << ": ";
  std::cout << calls << " calls, " << check::failures << " failures\n";
  return calls > 0 && check::failures == 0 ? 0 : 1;
}

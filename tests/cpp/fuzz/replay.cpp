// Runs files that a fuzzer found (its corpus, or what it says crashed) without it: any compiler, any sanitizer.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

#include "calls.h"

namespace {

namespace fs = std::filesystem;

std::vector<fs::path> files_of(int argc, char** argv) {
  std::vector<fs::path> files;
  for (int i = 1; i < argc; ++i) {
    if (!fs::is_directory(argv[i]))
      files.emplace_back(argv[i]);
    else
      for (const auto& entry : fs::directory_iterator(argv[i])) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

/// Files, and directories of them. A directory is a corpus: calls of every operator have to be accepted.
int main(int argc, char** argv) {
  const std::vector<fs::path> files = files_of(argc, argv);
  for (const fs::path& path : files) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (!file) return std::fprintf(stderr, "can't read %s\n", path.c_str()), 1;
    std::fprintf(stderr, "%s\n", path.filename().c_str());
    fuzz::run(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), true);
  }
  fuzz::print_counts();
  const auto& accepted = fuzz::counts().accepted;
  const bool is_corpus = std::any_of(argv + 1, argv + argc, [](const char* name) { return fs::is_directory(name); });
  if (is_corpus && std::count(accepted.begin(), accepted.end(), 0) > 0)
    return std::fprintf(stderr, "an operator has no accepted call in these files\n"), 1;
  return 0;
}

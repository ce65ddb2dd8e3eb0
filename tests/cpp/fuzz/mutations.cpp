// Drives the fuzzers' entry where libFuzzer is missing: the seeds as they are, and mutations of
// them, the same in each run.
//
//   forms_mutations [COUNT]          so many mutations, 20,000 by default
//   forms_mutations --corpus FOLDER  writes the seeds, for libFuzzer to begin with
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>

#include "fuzz/forms_fuzz.h"

namespace {

class Mutator {
 public:
  explicit Mutator(std::vector<std::string> seeds) : seeds_(std::move(seeds)) {}

  std::string next() {
    std::string bytes = seeds_[below(seeds_.size())];
    for (std::size_t i = below(4) + 1; i > 0 && bytes.size() > 1; --i) change(bytes);
    return bytes;
  }

 private:
  std::size_t below(std::size_t end) {
    return std::uniform_int_distribution<std::size_t>(0, end - 1)(engine_);
  }

  void change(std::string& bytes) {
    const std::size_t at = below(bytes.size());
    const auto byte = static_cast<char>(below(256));
    switch (below(5)) {
      case 0:
        bytes[at] = byte;
        break;
      case 1:  // one bit, or a number that is off by little
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 2:
        bytes.insert(at, below(10) + 1, below(2) == 0 ? byte : '\xff');
        break;
      case 3:
        bytes.erase(at, below(8) + 1);
        break;
      default: {  // a piece of another seed
        const std::string& other = seeds_[below(seeds_.size())];
        bytes.replace(at, below(16), other.substr(below(other.size()), below(16)));
      }
    }
  }

  std::vector<std::string> seeds_;
  std::mt19937 engine_{0};
};

void run(const std::string& bytes) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> seeds = kimisys::reshard::test::seeds();
  if (argc == 3 && std::string(argv[1]) == "--corpus") {
    std::filesystem::create_directories(argv[2]);
    for (std::size_t i = 0; i < seeds.size(); ++i) {
      std::ofstream(std::filesystem::path(argv[2]) / std::to_string(i), std::ios::binary)
          << seeds[i];
    }
    return 0;
  }
  const long count = argc > 1 ? std::atol(argv[1]) : 20'000;
  for (const std::string& seed : seeds) run(seed);
  Mutator mutator(seeds);
  for (long i = 0; i < count; ++i) run(mutator.next());
  std::printf("%zu seeds and %ld mutations\n", seeds.size(), count);
}

// The C++ library's containers: map, unordered_map, string, vector, sort, priority_queue.
#include "bench.h"
#include <algorithm>
#include <map>
#include <queue>
#include <string>
#include <unordered_map>
#include <vector>

static std::vector<std::string> words_of(const std::vector<unsigned char> &text) {
    std::vector<std::string> words;
    std::string word;
    for (unsigned char c : text) {
        if (c == ' ' || c == '.' || c == '\n') {
            if (!word.empty()) words.push_back(word);
            word.clear();
        } else {
            word += static_cast<char>(c);
        }
    }
    return words;
}

uint64_t bench(uint64_t size) {
    uint64_t sum = 0;
    for (uint64_t i = 0; i < size; i++) {
        std::vector<unsigned char> text(60000);
        make_text(text.data(), text.size(), 139 + i);
        std::vector<std::string> words = words_of(text);
        std::map<std::string, int> sorted;
        std::unordered_map<std::string, std::vector<size_t>> places;
        for (size_t at = 0; at < words.size(); at++) {
            sorted[words[at]]++;
            places[words[at]].push_back(at);
        }
        std::priority_queue<std::pair<int, std::string>> heap;
        for (const auto &[word, count] : sorted) heap.emplace(count, word);
        for (int top = 0; top < 500 && !heap.empty(); top++, heap.pop())
            sum = fold_word(sum, static_cast<uint64_t>(heap.top().first) + places[heap.top().second][0]);
        std::sort(words.begin(), words.end(), [](const std::string &a, const std::string &b) {
            return a.size() != b.size() ? a.size() < b.size() : a < b;
        });
        sum = fold(sum, words[words.size() / 2].data(), words[words.size() / 2].size());
    }
    return sum;
}

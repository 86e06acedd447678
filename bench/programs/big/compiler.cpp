// What the compiler gets to compile: containers of containers, sorted and counted.
#include <algorithm>
#include <map>
#include <string>
#include <vector>

std::map<std::string, std::vector<int>> places(const std::vector<std::string> &words) {
    std::map<std::string, std::vector<int>> found;
    for (size_t i = 0; i < words.size(); i++) found[words[i]].push_back(static_cast<int>(i));
    return found;
}

std::vector<std::pair<size_t, std::string>> ranked(const std::vector<std::string> &words) {
    std::vector<std::pair<size_t, std::string>> order;
    for (const auto &[word, at] : places(words)) order.emplace_back(at.size(), word + "!");
    std::sort(order.begin(), order.end(), [](const auto &a, const auto &b) {
        return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    return order;
}

/* Lua 5.4 interpreting tables, closures, strings and integer arithmetic. */
#include "bench.h"
#include <lauxlib.h>
#include <lualib.h>

static const char script[] =
    "local function queens(n)\n"
    "  local found, column, up, down = 0, {}, {}, {}\n"
    "  local function place(row)\n"
    "    if row > n then found = found + 1 return end\n"
    "    for c = 1, n do\n"
    "      if not (column[c] or up[row + c] or down[row - c]) then\n"
    "        column[c], up[row + c], down[row - c] = true, true, true\n"
    "        place(row + 1)\n"
    "        column[c], up[row + c], down[row - c] = nil, nil, nil\n"
    "      end\n"
    "    end\n"
    "  end\n"
    "  place(1)\n"
    "  return found\n"
    "end\n"
    "local function words(n)\n"
    "  local count, list = {}, {}\n"
    "  for i = 1, n do list[i] = string.format('%x', i * 2654435761 % 4093) end\n"
    "  for w in table.concat(list, ' '):gmatch('%x+') do count[w] = (count[w] or 0) + 1 end\n"
    "  local names = {}\n"
    "  for w, c in pairs(count) do names[#names + 1] = w .. c end\n"
    "  table.sort(names)\n"
    "  return #names + #names[#names // 2]\n"
    "end\n"
    "local sum = 0\n"
    "for i = 1, size do sum = sum * 31 + queens(6 + i % 2) * 1000 + words(3000) end\n"
    "return sum\n";

uint64_t bench(uint64_t size) {
    lua_State *lua = luaL_newstate();
    luaL_openlibs(lua);
    lua_pushinteger(lua, (lua_Integer)size);
    lua_setglobal(lua, "size");
    if (luaL_dostring(lua, script)) give_up(lua_tostring(lua, -1));
    uint64_t sum = (uint64_t)lua_tointeger(lua, -1);
    lua_close(lua);
    return sum;
}

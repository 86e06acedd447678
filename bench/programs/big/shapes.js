// Debian's Node.js: classes, closures, maps, strings, regular expressions, typed arrays, JSON.
"use strict";
const { writeSync } = require("fs");
writeSync(1, "S\n");
const size = Number(process.argv[2]);
let seed = 1;
const draw = (below) => ((seed = (seed * 16807) % 2147483647), seed % below);
class Shape { constructor(name) { this.name = name; } area() { return 0; } }
class Box extends Shape { constructor(w, h) { super("box"); this.w = w; this.h = h; } area() { return this.w * this.h; } }
class Stack extends Shape { constructor(parts) { super("stack"); this.parts = parts; } area() { return this.parts.reduce((sum, part) => sum + part.area(), 0); } }
let sum = 0;
for (let turn = 0; turn < size; turn++) {
  const shapes = [];
  for (let i = 0; i < 3000; i++) shapes.push(draw(3) && i ? new Stack([shapes[draw(i)], new Box(draw(9), 1)].map((s) => s instanceof Stack ? s.parts[1] : s)) : new Box(draw(50), draw(50)));
  const byArea = new Map();
  for (const shape of shapes) byArea.set(shape.area(), (byArea.get(shape.area()) || 0) + 1);
  const text = JSON.stringify([...byArea].sort((a, b) => a[0] - b[0]));
  const told = text.replace(/\[(\d+),(\d+)\]/g, (_, a, b) => `<${b}:${a}>`);
  for (let i = 0; i < told.length; i++) sum = (sum * 31 + told.charCodeAt(i)) >>> 0;
  const grid = new Float64Array(128 * 128);
  for (let i = 0; i < grid.length; i++) grid[i] = draw(100);
  for (let y = 1; y < 127; y++) for (let x = 1; x < 127; x++) grid[128 * y + x] = (grid[128 * y + x - 1] + grid[128 * y + x + 1] + grid[128 * (y - 1) + x]) / 4;
  sum = (sum + Math.floor(grid.reduce((a, b) => a + b))) >>> 0;
}
writeSync(1, `E ${sum.toString(16).padStart(8, "0")}\n`);

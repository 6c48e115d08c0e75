// node --test tests/player.test.mjs: the pure functions of the player, numbers derived by hand.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

const folder = new URL("../attnviz/panels/js/", import.meta.url);
const parts = await Promise.all(
  ["core.js", "player.js"].map((name) => readFile(new URL(name, folder), "utf8")),
);
const joined = Buffer.from(parts.join("\n")).toString("base64");
const panel = await import(`data:text/javascript;base64,${joined}`);
const bytes = (...values) => Uint8Array.from(values);

test("unpackFrames: an epoch is the difference from the one before, columns stand alone", () => {
  // one class; CAM of 1 x 2 with three epochs, OAA of 1 x 1 with two; then a class of 1 x 1
  const block = bytes(10, 250, 5, 7, 255, 0, 9, 247, 3, 1, 1, 4, 252);
  const grids = [[[1, 2], [1, 1]], [[1, 1], [1, 1]]];
  const stacks = panel.unpackFrames(block, grids, [3, 2]);
  assert.deepEqual(stacks[0][0].map((map) => [...map]), [[10, 250], [15, 1], [14, 1]]);
  assert.deepEqual(stacks[0][1].map((map) => [...map]), [[9], [0]]);
  assert.deepEqual(stacks[1].map((column) => column.map((map) => [...map])),
    [[[3], [4], [5]], [[4], [0]]]);
});

test("stretch: the largest value becomes 255, nothing stays nothing", () => {
  // 0 and 100 to four pixels: 0, 25, 75, 100
  assert.deepEqual([...panel.stretch(bytes(0, 100), [1, 2], [1, 4])], [0, 64, 191, 255]);
  // a slope down the rows, centers at 0, 0.25, 0.75, 1 of the way
  assert.deepEqual([...panel.stretch(bytes(40, 0), [2, 1], [4, 1])], [255, 191, 64, 0]);
  assert.deepEqual([...panel.stretch(bytes(0, 0), [1, 2], [1, 3])], [0, 0, 0]);
});

test("mark: at 50 % from level 128 on, new where it was not before", () => {
  const marks = new Uint8Array(4);
  assert.equal(panel.mark(bytes(127, 128, 255, 255), bytes(0, 127, 128, 0), 0.5, marks), 2);
  assert.deepEqual([...marks], [0, 2, 1, 2]);
  assert.equal(panel.mark(bytes(127, 128, 255, 255), null, 0.5, marks), 0);
  assert.deepEqual([...marks], [0, 1, 1, 1]);
});

test("paints and color: nothing at 0, the last color at 255, cyan over both", () => {
  const colors = new Uint8Array(768).fill(200, 765);
  const table = panel.paints(colors, 0.8);
  const target = new Uint32Array(4);
  panel.color(bytes(0, 255, 0, 255), bytes(1, 1, 2, 2), table, target);
  // opacity 204 = 0.8 * 255; 153 = 0.6 * 255; 0.6 + 0.4 * 0.8 = 0.92 and
  // (0.32 * 200 + 0.6 * 229) / 0.92 = 218.9, (0.32 * 200 + 0.6 * 255) / 0.92 = 235.9
  assert.deepEqual([...new Uint8Array(target.buffer)],
    [0, 0, 0, 0, 200, 200, 200, 204, 0, 229, 255, 153, 70, 219, 236, 235]);
});

test("countLevels and rates: recall, noise and share by hand, ignored pixels left out", () => {
  const counts = panel.countLevels(bytes(255, 100, 200, 0, 255), bytes(1, 1, 0, 0, 255));
  const rates = panel.rates(counts, 0.5);
  assert.deepEqual(rates, { found: 0.5, recall: 0.5, noise: 0.5 });
  assert.deepEqual(panel.rates(counts, 0.9), { found: 0.25, recall: 0.5, noise: 0 });
  const alone = panel.rates(panel.countLevels(bytes(0, 0, 255, 0), null), 0.5);
  assert.equal(alone.found, 0.25);
  assert.ok(Number.isNaN(alone.recall));
  const nothing = panel.rates(panel.countLevels(bytes(0, 0), bytes(1, 0)), 0.5);
  assert.deepEqual([nothing.recall, nothing.found], [0, 0]);
  assert.ok(Number.isNaN(nothing.noise));
});

test("outline: a pixel has four sides, a row of two has no line between them", () => {
  const sorted = (lines) => lines.map(String).sort();
  assert.deepEqual(sorted(panel.outline(bytes(0, 1, 0, 0), [2, 2])),
    ["1,0,1,1", "1,0,2,0", "1,1,2,1", "2,0,2,1"]);
  assert.deepEqual(sorted(panel.outline(bytes(1, 1, 0, 0), [2, 2])),
    ["0,0,0,1", "0,0,2,0", "0,1,2,1", "2,0,2,1"]);
  assert.deepEqual(panel.outline(bytes(0, 0, 0, 0), [2, 2]), []);
});

test("outline: a ring has a line inside, corners that touch stay apart", () => {
  const ring = bytes(1, 1, 1, 1, 0, 1, 1, 1, 1);
  assert.equal(panel.outline(ring, [3, 3]).length, 8);
  const length = panel.outline(bytes(1, 0, 0, 1), [2, 2])
    .reduce((sum, [x0, y0, x1, y1]) => sum + x1 - x0 + y1 - y0, 0);
  assert.equal(length, 8);
});

test("playhead: by the clock, not by the frames, and never past the end", () => {
  assert.equal(panel.playhead(0, 500, 4, 10), 2);
  assert.equal(panel.playhead(3, 250, 2, 10), 3.5);
  assert.equal(panel.playhead(3, 60_000, 2, 10), 9);
  assert.equal(panel.playhead(3, -5, 2, 10), 3);
});

test("ceiling: the axis ends at the next round number", () => {
  assert.deepEqual([0, 0.05, 0.07, 0.31, 0.95].map(panel.ceiling), [0.05, 0.05, 0.1, 0.4, 1]);
});

test("settings: what plays is sent by `send` only, and wins until then", async () => {
  const state = { epoch: 1 };
  const heard = {};
  let sent = 0;
  const model = {
    get: (name) => state[name],
    set(name, value) {
      if (state[name] === value) return;
      state[name] = value;
      heard[`change:${name}`]?.();
    },
    on: (event, listener) => (heard[event] = listener),
    off: (event) => delete heard[event],
    save_changes: () => sent++,
  };
  const values = panel.settings(model, ["epoch"], () => {});
  values.set({ epoch: 2 }, false);
  await new Promise((resolve) => setTimeout(resolve, 200));
  assert.equal(sent, 0);
  model.set("epoch", 9); // the kernel goes on to a new epoch
  assert.equal(values.get("epoch"), 2);
  values.send();
  assert.equal(sent, 1);
});

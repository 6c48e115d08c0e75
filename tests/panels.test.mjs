// node --test tests/panels.test.mjs: the pure functions of the panels, numbers derived by hand.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

const folder = new URL("../attnviz/panels/js/", import.meta.url);
const parts = await Promise.all(
  ["core.js", "layercam.js"].map((name) => readFile(new URL(name, folder), "utf8")),
);
const joined = Buffer.from(parts.join("\n")).toString("base64");
const panel = await import(`data:text/javascript;base64,${joined}`);
const floats = (...values) => Float32Array.from(values);
const close = (actual, expected, tolerance = 1e-6) => {
  assert.equal(actual.length, expected.length);
  expected.forEach((value, i) => assert.ok(Math.abs(actual[i] - value) < tolerance, `${actual}`));
};
const grid = (...rows) => Float32Array.from(rows.join(""), Number);

test("bilinear: two pixels to four, centers at -0.25, 0.25, 0.75, 1.25", () => {
  const { low, high, weight } = panel.bilinear(2, 4);
  assert.deepEqual([...low], [0, 0, 0, 1]);
  assert.deepEqual([...high], [1, 1, 1, 1]);
  close(weight, [0, 0.25, 0.75, 0.25]);
});

test("bilinear: four pixels to two fall between the pixels, one pixel stays alone", () => {
  const { low, weight } = panel.bilinear(4, 2);
  assert.deepEqual([...low], [0, 2]);
  close(weight, [0.5, 0.5]);
  assert.deepEqual([...panel.bilinear(1, 3).high], [0, 0, 0]);
});

test("resizeMax: a slope of 2 x 2 becomes 2 x 4, and larger values stay", () => {
  const target = floats(0, 9, 0, 0, 0, 0, 0, 0);
  panel.resizeMax(floats(0, 4, 8, 12), [2, 2], target, [2, 4]);
  close(target, [0, 9, 3, 4, 8, 9, 11, 12]);
});

test("resizeMax: reducing the height skips rows", () => {
  const target = new Float32Array(2);
  panel.resizeMax(floats(1, 2, 3, 4, 5, 6, 7, 8), [8, 1], target, [2, 1]);
  close(target, [2.5, 6.5]);
});

test("sample: pixel centers give pixels, corners the nearest, the middle the mean", () => {
  const map = floats(0, 4, 8, 12);
  assert.equal(panel.sample(map, [2, 2], 0.25, 0.25), 0);
  assert.equal(panel.sample(map, [2, 2], 0.99, 0.01), 4);
  assert.equal(panel.sample(map, [2, 2], 0.5, 0.5), 6);
});

test("scaleLevels: the four functions at level 255 and 0", () => {
  for (const [name, end] of [["none", 1], ["tanh", 0.9640276], ["sqrt", 1], ["tan", 1.5574077]])
    close([panel.scaleLevels(name, 2)[0], panel.scaleLevels(name, 2)[255]], [0, end]);
  close([panel.scaleLevels("sqrt", 2)[51]], [0.4472136]);
});

test("componentBox: eight neighbours, by pixels and not by area of the box", () => {
  const map = grid(
    "1000000",
    "0100000",
    "0010111",
    "0001111",
    "0000000",
    "1100000",
  );
  assert.deepEqual(panel.componentBox(map, [6, 7], 0.5, 1), [0, 0, 7, 4]);
  const apart = grid(
    "1000000",
    "0100000",
    "0010000",
    "0000011",
    "0000011",
  );
  assert.deepEqual(panel.componentBox(apart, [5, 7], 0.5, 1), [5, 3, 7, 5]);
});

test("componentBox: arms that meet late are one component; the first of equals wins", () => {
  const fork = grid("101", "101", "111");
  assert.deepEqual(panel.componentBox(fork, [3, 3], 0, 1), [0, 0, 3, 3]);
  const diagonal = grid("0101", "1010", "0000", "0011");
  assert.deepEqual(panel.componentBox(diagonal, [4, 4], 0, 1), [0, 0, 4, 2]);
  assert.deepEqual(panel.componentBox(grid("101"), [1, 3], 0, 1), [0, 0, 1, 1]);
  assert.deepEqual(panel.componentBox(grid("110", "000", "001"), [3, 3], 0, 1), [0, 0, 2, 1]);
});

test("componentBox: strictly above the threshold, none for a zero map", () => {
  const map = floats(1, 2, 4, 4);
  assert.deepEqual(panel.componentBox(map, [1, 4], 0.5, 4), [2, 0, 4, 1]);
  assert.equal(panel.componentBox(new Float32Array(4), [2, 2], 0, 0), null);
});

test("iou: a quarter shared of two, apart, the same", () => {
  close([panel.iou([0, 0, 2, 2], [1, 1, 3, 3])], [1 / 7]);
  assert.equal(panel.iou([0, 0, 1, 1], [1, 0, 2, 1]), 0);
  assert.equal(panel.iou([2, 3, 5, 9], [2, 3, 5, 9]), 1);
});

test("overlay: nothing at zero, the last color at the peak, opacity by the root", () => {
  const colors = new Uint8Array(768).fill(200, 765).fill(100, 3 * 64, 3 * 64 + 3);
  const pixels = Uint8ClampedArray.from({ length: 12 }, (_, i) => (i % 4 === 3 ? 255 : 40));
  const target = new Uint8ClampedArray(12);
  panel.overlay(pixels, floats(0, 0.5, 2), 2, colors, 1, target);
  // level 64 of 255: weight sqrt(64 / 255) = 0.500979, 40 + 0.500979 * 60 = 70.06
  assert.deepEqual([...target], [40, 40, 40, 255, 70, 70, 70, 255, 200, 200, 200, 255]);
});

test("isScaled: all selected but the deepest", () => {
  assert.deepEqual([1, 3, 4].map((k) => panel.isScaled(k, [1, 3, 4], "shallow")), [true, true, false]);
  assert.ok(panel.isScaled(4, [4], "all"));
  assert.ok(!panel.isScaled(1, [1, 4], "none"));
});

test("unpack: classes are differences modulo 256 within method and stage", () => {
  const bytes = Uint8Array.from([10, 250, 5, 7, 10, 250, 1, 255]);
  const stacks = panel.unpack(bytes, 2, ["a", "b"], [[1, 2]]);
  assert.deepEqual(stacks.map((stack) => [...stack.a[0]]), [[10, 250], [15, 1]]);
  assert.deepEqual(stacks.map((stack) => [...stack.b[0]]), [[10, 250], [11, 249]]);
});

test("fuse: the shallow stage is bent, the deepest is not, the larger value stays", () => {
  const stack = [Uint8Array.from([255, 0]), Uint8Array.from([0, 255])];
  const options = { scaling: "tanh", gamma: 2, scaled: "shallow" };
  close(panel.fuse(stack, [[1, 2], [1, 2]], [1, 2], options, [1, 2]), [0.9640276, 1]);
  close(panel.fuse(stack, [[1, 2], [1, 2]], [], options, [1, 2]), [0, 0]);
});

test("shrink: the mean of the pixels that fall together", () => {
  const pixels = Uint8ClampedArray.from([0, 10, 20, 255, 100, 30, 40, 255]);
  assert.deepEqual([...panel.shrink(pixels, [1, 2], [1, 1])], [50, 20, 30, 255]);
});

test("settings: what was set here wins until it was sent", async () => {
  const state = { gamma: 2 };
  const heard = {};
  let [sent, drawn] = [0, 0];
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
  const values = panel.settings(model, ["gamma"], () => drawn++);
  values.set({ gamma: 5 });
  model.set("gamma", 3); // an echo of an older value
  assert.equal(values.get("gamma"), 5);
  assert.equal(sent, 0);
  await new Promise((resolve) => setTimeout(resolve, 200));
  assert.equal(sent, 1);
  model.set("gamma", 4);
  assert.equal(values.get("gamma"), 4);
  assert.ok(drawn >= 2);
  values.set({ gamma: 6 });
  values.stop();
  assert.equal(sent, 2);
  assert.deepEqual(Object.keys(heard), []);
});

// node --test tests/pipeline.test.mjs: the pure functions of the label panel, numbers by hand.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

const folder = new URL("../attnviz/panels/js/", import.meta.url);
const parts = await Promise.all(
  ["core.js", "pipeline.js"].map((name) => readFile(new URL(name, folder), "utf8")),
);
const joined = Buffer.from(parts.join("\n")).toString("base64");
const panel = await import(`data:text/javascript;base64,${joined}`);
const bytes = (...values) => Uint8Array.from(values);
const doubles = (...values) => Float64Array.from(values);
const AT = { floor: 0.3, conflict: 0.9, salient: 0.125, strong: 0.8, least: 0 };

test("unpackPlanes: a row is the difference from the one above, modulo 256", () => {
  const planes = panel.unpackPlanes(bytes(10, 250, 5, 7, 255, 0, 9), [[3, 2], [1, 1]]);
  assert.deepEqual(planes.map((plane) => [...plane]), [[10, 250, 15, 1, 14, 1], [9]]);
});

test("stretchLevels: centers at 0, 0.25, 0.75, 1 of the way, the largest becomes 255", () => {
  assert.deepEqual([...panel.stretchLevels(bytes(0, 100), [1, 2], [1, 4])], [0, 64, 191, 255]);
  assert.deepEqual([...panel.stretchLevels(bytes(40, 0), [2, 1], [4, 1])], [255, 191, 64, 0]);
  assert.deepEqual([...panel.stretchLevels(bytes(0, 0), [1, 2], [1, 3])], [0, 0, 0]);
});

test("regionMeans and spreadMap: a mean for each region, from 0 to 1; a flat map is zero", () => {
  const means = panel.regionMeans(doubles(0, 0.5, 1, 0.5), bytes(0, 0, 1, 1), 2);
  assert.deepEqual([...means], [0.25, 0.25, 0.75, 0.75]);
  assert.deepEqual([...panel.spreadMap(doubles(2, 3, 4))], [0, 0.5, 1]);
  assert.deepEqual([...panel.spreadMap(doubles(7, 7))], [0, 0]);
});

test("backgroundCue: one minus saliency, one minus the maximum to a power, a constant", () => {
  const maps = [doubles(0.5, 0), doubles(0.25, 0)];
  const cue = (kind) => [...panel.backgroundCue(kind, maps, [0.25, 1], { power: 2, constant: 0.4 })];
  assert.deepEqual(cue("saliency"), [0.75, 0]);
  assert.deepEqual(cue("affinity"), [0.25, 1]);
  assert.deepEqual(cue("constant"), [0.4, 0.4]);
});

test("ruleLabels: every rule, and its reason", () => {
  //                 class, floor cuts, two high, salient, strong, background wins a tie
  const first = doubles(0.7, 0.29, 0.95, 0.2, 0.85, 0.5);
  const second = doubles(0.1, 0.1, 0.91, 0.1, 0.1, 0.1);
  const saliency = [0.5, 0.05, 0.6, 0.9, 0.1, 0.5];
  const cue = Float64Array.from(saliency, (value) => 1 - value);
  const found = panel.ruleLabels([first, second], cue, saliency, AT);
  assert.deepEqual([...found.labels], [1, 0, 255, 255, 255, 255]);
  assert.deepEqual([...found.reasons], [0, 0, 1, 2, 3, 2]);
});

test("ruleLabels: without saliency nothing is cut, and strong background stays", () => {
  const cue = doubles(0.85, 0.2, 0.95);
  const found = panel.ruleLabels([doubles(0.82, 0.25, 0.91)], cue, null, AT);
  assert.deepEqual([...found.labels], [0, 1, 255]);
});

test("ruleLabels: too few objects leave out the picture", () => {
  const map = doubles(1, 0, 0, 0);
  const cue = doubles(0, 1, 1, 1);
  const labels = (least) => [...panel.ruleLabels([map], cue, null, { ...AT, least }).labels];
  assert.deepEqual(labels(0.25), [1, 0, 0, 0]);
  assert.deepEqual(labels(0.26), [255, 255, 255, 255]);
});

test("voteLabels: the first of equal classes, and a class wins a tie with background", () => {
  const means = [doubles(0.3, 0.2, 0.5), doubles(0.1, 0.2, 0.5)];
  assert.deepEqual([...panel.voteLabels(means, 0.3).labels], [1, 0, 1]);
  assert.deepEqual([...panel.voteLabels(means, 0.2).labels], [1, 1, 1]);
});

test("scoreLabels: by hand, pixels that either leaves out do not count", () => {
  const truth = bytes(1, 1, 0, 0, 1, 255, 0, 3);
  const scores = panel.scoreLabels(bytes(1, 0, 0, 1, 255, 1, 0, 0), truth);
  assert.deepEqual([0, 1, 3].map((label) => scores.ious[label]), [2 / 5, 1 / 3, 0]);
  assert.ok(Number.isNaN(scores.ious[2]));
  assert.equal(scores.mean, (2 / 5 + 1 / 3) / 3);
  assert.deepEqual([0, 1, 255].map((label) => scores.shares[label]), [0.5, 0.375, 0.125]);
  assert.ok(Number.isNaN(panel.scoreLabels(bytes(0), null).mean));
});

test("paintLabels: a tone, half as dark, and stripes two pixels wide", () => {
  const pixels = Uint8ClampedArray.from({ length: 24 }, () => 100);
  const tones = new Uint8Array(768).fill(200, 3, 6).fill(255, 765);
  const target = new Uint8ClampedArray(24);
  panel.paintLabels(pixels, bytes(1, 0, 255, 255, 255, 255), tones, 0.5, [1, 6], target);
  // halves: 150; a quarter of black: 75; stripes begin at x = 4: (100 + 255) / 2 = 178
  assert.deepEqual([...target].filter((_, i) => i % 4 === 0), [150, 75, 100, 100, 178, 178]);
});

test("borderPath: a line between different labels, none round the picture", () => {
  assert.equal(panel.borderPath(bytes(1, 1, 2, 2), [2, 2]), "M0 1H2");
  assert.equal(panel.borderPath(bytes(1, 2, 1, 2), [2, 2]), "M1 0V2");
  assert.equal(panel.borderPath(bytes(1, 1, 1, 1), [2, 2]), "");
});

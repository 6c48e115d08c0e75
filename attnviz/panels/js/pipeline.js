// The label panel. Joined behind core.js, whose functions it uses.

const LEFT_OUT = 255;
const BORDER_WEIGHT = 160; // of 256
const METHODS = [["rules", "rules for each pixel"], ["superpixels", "vote of superpixels"]];
const CUES = { saliency: "saliency", affinity: "maps: (1 − max)^α", constant: "a constant" };
const REGIONS = { slic: "SLIC", felzenszwalb: "Felzenszwalb" };
const PUBLISHED = {
  floor: 0.3, conflict: 0.9, salient: 32 / 255, strong: 0.8, least: 0.01, power: 4,
  constant: 0.25, background: 0.3,
};
const KEYS = [
  ["M", "rules or vote"], ["B", "next cue for background"], ["S", "next superpixels"],
  ["A", "average maps or not"], ["C", "next class"], ["N", "next mask of the network"],
  ["T", "outline the truth"], ["R", "published thresholds"], ["← → ↑ ↓", "move the point"],
  ["?", "these keys"],
];

const USED = {
  saliency: ["floor", "salient", "strong"], affinity: ["power"], constant: ["constant"],
};

// ------------------------------------------------------------------------------ pure functions

/** Planes of bytes; a row is stored as its difference from the one above, modulo 256. */
export function unpackPlanes(bytes, sizes) {
  let start = 0;
  return sizes.map(([rows, columns]) => {
    const plane = bytes.subarray(start, (start += rows * columns));
    for (let i = columns; i < plane.length; i++) plane[i] += plane[i - columns];
    return plane;
  });
}

/** A map resized to the picture, in levels of its largest value; twice as exact as a Float32. */
export function stretchLevels(map, [rows, columns], [height, width]) {
  const across = bilinear(columns, width);
  const down = bilinear(rows, height);
  const values = new Float64Array(height * width);
  const line = new Float64Array(columns);
  for (let y = 0, i = 0; y < height; y++) {
    const [upper, lower, weight] = [down.low[y] * columns, down.high[y] * columns, down.weight[y]];
    for (let x = 0; x < columns; x++)
      line[x] = map[upper + x] + weight * (map[lower + x] - map[upper + x]);
    for (let x = 0; x < width; x++, i++) {
      const left = line[across.low[x]];
      values[i] = left + across.weight[x] * (line[across.high[x]] - left);
    }
  }
  const peak = peakOf(values);
  const factor = peak > 0 ? 255 / peak : 0;
  return Uint8Array.from(values, (value) => value * factor + 0.5);
}

/** The mean of a map over the region of each pixel. */
export function regionMeans(map, regions, count) {
  const sums = new Float64Array(count);
  const pixels = new Float64Array(count);
  for (let i = 0; i < map.length; i++) {
    sums[regions[i]] += map[i];
    pixels[regions[i]]++;
  }
  const means = new Float64Array(map.length);
  for (let i = 0; i < map.length; i++) means[i] = sums[regions[i]] / pixels[regions[i]];
  return means;
}

/** A map stretched to [0, 1]; a flat one is zero. */
export function spreadMap(map) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of map) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const spread = new Float64Array(map.length);
  const range = high > low ? high - low : 1;
  for (let i = 0; i < map.length; i++) spread[i] = (map[i] - low) / range;
  return spread;
}

/** How much each pixel is background: by saliency, or from the stretched maps. */
export function backgroundCue(kind, maps, saliency, { power, constant }) {
  const cue = new Float64Array(maps[0].length);
  if (kind === "saliency") return cue.map((_, i) => 1 - saliency[i]);
  if (kind === "constant") return cue.fill(constant);
  for (let i = 0; i < cue.length; i++) {
    let most = 0;
    for (let k = 0; k < maps.length; k++) if (maps[k][i] > most) most = maps[k][i];
    cue[i] = (1 - most) ** power;
  }
  return cue;
}

/**
 * The labels of the rules: 0, 1 + the place of a class, or 255; and why a pixel is left out: 1 two
 * channels exceed `conflict`, 2 salient background, 3 background on a strong map, 4 too few
 * objects. Without saliency nothing is cut at `floor`, and the reasons 2 and 3 fall away.
 */
export function ruleLabels(maps, cue, saliency, { floor, conflict, salient, strong, least }) {
  const labels = new Uint8Array(cue.length);
  const reasons = new Uint8Array(cue.length);
  const cut = saliency ? floor : 0;
  let objects = 0;
  for (let i = 0; i < labels.length; i++) {
    let best = cue[i] < cut ? 0 : cue[i];
    let above = best > conflict ? 1 : 0;
    let label = 0;
    let isStrong = false;
    for (let k = 0; k < maps.length; k++) {
      const raw = maps[k][i];
      const value = raw < cut ? 0 : raw;
      if (value > conflict) above++;
      if (raw > strong) isStrong = true;
      if (value > best) { // of equal ones the first
        best = value;
        label = k + 1;
      }
    }
    if (above >= 2) reasons[i] = 1;
    else if (saliency && label === 0)
      reasons[i] = saliency[i] >= salient ? 2 : isStrong ? 3 : 0;
    labels[i] = reasons[i] ? LEFT_OUT : label;
    if (label && !reasons[i]) objects++;
  }
  if (objects / labels.length < least) {
    labels.fill(LEFT_OUT);
    reasons.fill(4);
  }
  return { labels, reasons };
}

/** The labels of the vote: the class with the largest mean, or 0 where no mean reaches a value. */
export function voteLabels(means, background) {
  const labels = new Uint8Array(means[0].length);
  for (let i = 0; i < labels.length; i++) {
    let label = 0;
    for (let k = 1; k < means.length; k++) if (means[k][i] > means[label][i]) label = k;
    labels[i] = background > means[label][i] ? 0 : label + 1;
  }
  return { labels, reasons: new Uint8Array(labels.length) };
}

/**
 * How labels fit the true mask, over the pixels that neither leaves out: intersection over union
 * of each label that occurs, and their mean; without a true mask shares only.
 */
export function scoreLabels(labels, truth) {
  const [ours, true_, both, all] = Array.from({ length: 4 }, () => new Float64Array(256));
  for (let i = 0; i < labels.length; i++) {
    all[labels[i]]++;
    if (!truth || labels[i] === LEFT_OUT || truth[i] === LEFT_OUT) continue;
    ours[labels[i]]++;
    true_[truth[i]]++;
    if (labels[i] === truth[i]) both[labels[i]]++;
  }
  const ious = Array.from(both, (shared, label) => {
    const union = ours[label] + true_[label] - shared;
    return union ? shared / union : NaN;
  });
  const known = ious.filter(Number.isFinite);
  const sum = known.reduce((total, value) => total + value, 0);
  return {
    ious, mean: known.length ? sum / known.length : NaN,
    shares: Array.from(all, (count) => count / labels.length),
  };
}

/**
 * Lays labels over a picture: a class in its tone, background dimmed, what is left out striped.
 * `tones` are RGB by label, black for 0 and white for 255.
 */
export function paintLabels(pixels, labels, tones, opacity, [, width], target) {
  const weight = Math.floor(opacity * 256 + 0.5);
  const stripe = Math.max(2, Math.floor(width / 56));
  for (let i = 0, p = 0, x = 0, y = 0; i < labels.length; i++, p += 4) {
    const label = labels[i];
    let share = weight;
    if (label === 0) share = weight >> 1;
    else if (label === LEFT_OUT && ((x + y) / stripe) & 1) share = 0;
    const at = 3 * label;
    target[p] = ((256 - share) * pixels[p] + share * tones[at] + 128) >> 8;
    target[p + 1] = ((256 - share) * pixels[p + 1] + share * tones[at + 1] + 128) >> 8;
    target[p + 2] = ((256 - share) * pixels[p + 2] + share * tones[at + 2] + 128) >> 8;
    target[p + 3] = 255;
    if (++x === width) {
      x = 0;
      y++;
    }
  }
}

/** Draws the borders of regions into a picture. */
export function paintRegions(pixels, regions, [, width], target) {
  target.set(pixels);
  for (let i = 0, p = 0; i < regions.length; i++, p += 4) {
    const edge = (i >= width && regions[i] !== regions[i - width]) ||
      (i % width && regions[i] !== regions[i - 1]);
    if (!edge) continue;
    for (let c = 0; c < 3; c++)
      target[p + c] = ((256 - BORDER_WEIGHT) * pixels[p + c] + BORDER_WEIGHT * 255 + 128) >> 8;
  }
}

/** The lines between pixels of different labels, as a path. */
export function borderPath(labels, [height, width]) {
  let path = "";
  const run = (count, length, differs, line) => {
    for (let row = 1; row < count; row++)
      for (let x = 0; x < length; x++) {
        const start = x;
        while (x < length && differs(row, x)) x++;
        if (x > start) path += line(row, start, x);
      }
  };
  run(height, width, (y, x) => labels[y * width + x] !== labels[(y - 1) * width + x],
    (y, start, end) => `M${start} ${y}H${end}`);
  run(width, height, (x, y) => labels[y * width + x] !== labels[y * width + x - 1],
    (x, start, end) => `M${x} ${start}V${end}`);
  return path;
}

function shareText(value) {
  if (!Number.isFinite(value)) return "–";
  return value > 0 && value < 0.0995 ? `${(100 * value).toFixed(1)} %` : `${Math.round(100 * value)} %`;
}

// ------------------------------------------------------------------------------------ the panel

/** Builds the panel in `el`; returns what takes it away again. */
function build(model, el) {
  const data = model.get("_data");
  const { width, height, classes, predictions } = data;
  const size = [height, width];
  const withMap = classes.slice(0, data.grids.length);
  const palettes = Object.fromEntries(
    Object.entries(data.palettes).map(([name, view]) => [name, bytesOf(view)]),
  );
  const tones = new Uint8Array(768).fill(255, 3 * LEFT_OUT);
  classes.forEach(({ id }, k) => tones.set(data.tones[k], 3 * (1 + id)));
  const colorOf = (label) => `rgb(${tones.subarray(3 * label, 3 * label + 3).join(" ")})`;
  const nameOf = (label) => (label === 0 ? "background"
    : label === LEFT_OUT ? "left out" : classes.find(({ id }) => id === label - 1)?.name ?? "–");
  const known = new Map(); // what was computed last, by name, with what it was made of
  let loaded = null; // pixels, maps, saliency, regions, masks
  let shown = null; // what the last frame drew
  let frame = 0;
  let probe = null; // the pointer, in pixels of the picture

  const redraw = () => (frame ||= requestAnimationFrame(draw));
  const THRESHOLDS = Object.keys(PUBLISHED);
  const values = settings(
    model,
    ["method", "cue", "regions", "averaged", "class_id", "prediction", "outlined", "opacity",
      "palette", ...THRESHOLDS],
    redraw,
  );
  const once = (name, parts, make) => {
    const key = JSON.stringify(parts);
    if (known.get(name)?.key !== key) known.set(name, { key, value: make() });
    return known.get(name).value;
  };

  // ------------------------------------------------------------------------------- elements
  const makeStep = (kind, title) => {
    const canvas = element("canvas", { role: "img", class: kind === "labels" ? "attnviz-map" : null });
    const layer = element("svg", { "aria-hidden": "true", preserveAspectRatio: "xMidYMid meet",
      viewBox: `0 0 ${width} ${height}` });
    const heading = element("strong", {}, title);
    const under = element("span", { class: "attnviz-rates" });
    const area = element("div", { class: "attnviz-picture" }, canvas, layer);
    const number = element("i", { class: "attnviz-number-badge", "aria-hidden": "true" });
    const root = element("figure", { class: "attnviz-column attnviz-step-of-labels" },
      element("figcaption", {}, number, heading), area, under);
    return { kind, canvas, layer, heading, under, area, root, number, paths: {} };
  };
  const steps = Object.fromEntries([
    ["picture", "Picture"], ["maps", "Map"], ["background", "Background"],
    ["labels", "Pseudo labels"], ["network", "Network"],
  ].filter(([kind]) => kind !== "network" || predictions.length)
    .map(([kind, title]) => [kind, makeStep(kind, title)]));
  Object.values(steps).forEach(({ number }, k) => (number.textContent = k + 1));
  const stage = element(
    "div", { class: "attnviz-columns attnviz-label-steps", tabindex: "0", role: "group",
      "aria-label": "Steps; the arrow keys move a point, ? shows all keys" },
    ...Object.values(steps).map(({ root }) => root),
  );
  stage.dataset.count = Object.keys(steps).length;
  const readout = element("div", { class: "attnviz-readout attnviz-label-readout" });

  const method = choice("Labels by", METHODS, (x) => values.set({ method: x }));
  const cues = Object.entries(CUES).slice(data.salient ? 0 : 1);
  const cue = choice("Background by", cues, (x) => values.set({ cue: x }));
  const regions = choice("Superpixels", data.regions.map((name) => [name, REGIONS[name] ?? name]),
    (x) => values.set({ regions: x }));
  const averaged = element("input", { type: "checkbox" });
  averaged.addEventListener("change", () => values.set({ averaged: averaged.checked }));
  const averagedRow = element("label", { class: "attnviz-check",
    title: "The rules see the maps' means over the superpixels, whose borders are the picture's" },
  averaged, "Average maps over superpixels");

  const threshold = (name, label, title, more = {}) => {
    const { min = 0, max = 1, step = 0.01, show = shareText, unit = 1 } = more;
    const made = slider(label, { min, max, step, show: (x) => show(x / unit),
      onset: (x) => values.set({ [name]: x / unit }) });
    made.row.title = title;
    return { ...made, set: (value) => made.update(Math.round(value * unit * 1e6) / 1e6) };
  };
  const thresholds = {
    floor: threshold("floor", "Values count from", "Lower values of the cue and the maps are zero"),
    conflict: threshold("conflict", "Conflict above", "Where two exceed it, the pixel is left out"),
    salient: threshold("salient", "Salient from",
      "Background that is this salient is left out: something the maps have missed",
      { max: 255, step: 1, unit: 255 }),
    strong: threshold("strong", "Strong map above",
      "Background where a map exceeds it is left out"),
    power: threshold("power", "Power α", "The higher, the less is background",
      { min: 1, max: 32, step: 0.5, show: (x) => `${x}` }),
    constant: threshold("constant", "Constant", "What a map must exceed"),
    background: threshold("background", "Class from", "Superpixels with lower means are background"),
    least: threshold("least", "Objects at least",
      "A picture with a smaller share of objects is left out", { max: 0.2, step: 0.005 }),
  };
  const reset = element("button", { type: "button", class: "attnviz-button",
    title: "The thresholds as published (R)", onclick: () => resetAll() }, "Published values");
  const opacity = slider("Opacity", {
    min: 0, max: 1, step: 0.01, show: (x) => `${Math.round(100 * x)} %`,
    onset: (x) => values.set({ opacity: x }),
  });
  const palette = choice(
    "Colors", Object.keys(palettes).map((name) => [name, name]), (x) => values.set({ palette: x }),
  );
  const outlined = element("input", { type: "checkbox" });
  outlined.addEventListener("change", () => values.set({ outlined: outlined.checked }));
  const prediction = choice("Mask of the network", predictions.map((name) => [name, name]),
    (x) => values.set({ prediction: x }));

  const group = Math.random().toString(36).slice(2);
  const kinds = ["labels", ...(predictions.length ? ["network"] : [])];
  const cellsOf = (wanted) => kinds.flatMap((kind) =>
    ["share", ...(data.truth ? ["iou"] : [])].map((what) => ({ kind, what, wanted,
      node: element("td", { class: what === "share" ? "attnviz-part" : null }) })));
  const rowOf = (label) => {
    const swatch = element("i", { class: "attnviz-swatch", "aria-hidden": "true" });
    if (label > 0) swatch.style.setProperty("--tone", colorOf(label));
    const chosen = withMap.some(({ id }) => id === label - 1);
    const input = chosen ? element("input", { type: "radio", name: `map-${group}`, value: label - 1,
      onchange: () => values.set({ class_id: label - 1 }) }) : null;
    const name = element(chosen ? "label" : "span", { class: "attnviz-label-name" }, input, swatch,
      element("span", { class: "attnviz-name" }, nameOf(label)));
    return { label, input, ...tableRow(name, cellsOf(({ ious, shares }, what) =>
      (what === "iou" ? ious : shares)[label])) };
  };
  const tableRow = (name, cells, attributes = {}) => ({ cells, root: element(
    "tr", attributes, element("th", { scope: "row" }, name), ...cells.map(({ node }) => node),
  ) });
  const rows = [0, ...classes.map(({ id }) => 1 + id)].map(rowOf);
  const foot = [tableRow("left out", cellsOf(({ shares }, what) =>
    (what === "share" ? shares[LEFT_OUT] : null)), { class: "attnviz-part" })];
  if (data.truth)
    foot.push(tableRow("mean IoU", cellsOf(({ mean }, what) => (what === "iou" ? mean : null)),
      { class: "attnviz-mean" }));
  const table = element(
    "table", { class: `attnviz-label-table${data.truth ? " attnviz-scored" : ""}` },
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Class",
      element("span", { class: "attnviz-wide" }, ", its map"),
      data.truth ? element("span", { class: "attnviz-narrow" }, ", IoU") : null),
      ...cellsOf().map(({ kind, what }) => (what === "share"
        ? element("th", { scope: "col", class: "attnviz-part",
          title: `share of the picture, ${kind}` }, kind)
        : element("th", { scope: "col", title: `intersection over union with the truth, ${kind}` },
          element("span", { class: "attnviz-wide" }, "IoU"),
          element("span", { class: "attnviz-narrow" }, kind)))))),
    element("tbody", {}, ...rows.map(({ root }) => root)),
    element("tfoot", {}, ...foot.map(({ root }) => root)),
  );

  const problem = element("div", { class: "attnviz-error", role: "alert", hidden: true });
  const root = element("div", { class: "attnviz-panel attnviz-labels" });
  const head = element(
    "div", { class: "attnviz-head" },
    element("span", { class: "attnviz-title" }, data.network || "From maps to labels"),
    method.row,
    headEnd(root, { keys: KEYS, figure: drawFigure,
      name: () => fileName("labels", nameOf(1 + chosenClass())) }),
  );
  root.append(
    problem, head, stage, readout,
    element(
      "div", { class: "attnviz-label-body" },
      element("div", { class: "attnviz-controls" },
        element("div", { class: "attnviz-row attnviz-choices" }, cue.row, regions.row, averagedRow),
        element("div", { class: "attnviz-thresholds" },
          ...Object.values(thresholds).map(({ row }) => row)),
        element("div", { class: "attnviz-row attnviz-looks" }, opacity.row, palette.row,
          data.truth ? element("label", { class: "attnviz-check" }, outlined, "Outline the truth") : null,
          reset)),
      element("div", { class: "attnviz-label-scores" },
        predictions.length > 1 ? prediction.row : null, table),
    ),
  );
  root.style.setProperty("--ratio", width / height);
  el.replaceChildren(root);
  root.addEventListener("change", values.send); // a control was let go

  // ------------------------------------------------------------------------------- behaviour
  /** The class whose map is shown; the first one where a linked panel shows one without a map. */
  function chosenClass() {
    const wanted = values.get("class_id");
    return withMap.some(({ id }) => id === wanted) ? wanted : withMap[0].id;
  }

  function usedThresholds() {
    return values.get("method") === "superpixels" ? ["background"]
      : ["conflict", "least", ...USED[values.get("cue")]];
  }

  function resetAll() {
    values.set(PUBLISHED);
    values.send();
  }

  const nextOf = (list, value) => list[(list.indexOf(value) + 1) % list.length];
  const cycle = (name, list) => values.set({ [name]: nextOf(list, values.get(name)) });
  const keys = {
    m: () => cycle("method", METHODS.map(([name]) => name)),
    b: () => cycle("cue", cues.map(([name]) => name)),
    s: () => cycle("regions", data.regions),
    a: () => cycle("averaged", [false, true]),
    c: () => cycle("class_id", withMap.map(({ id }) => id)),
    n: () => predictions.length && cycle("prediction", predictions),
    t: () => cycle("outlined", [false, true]),
    r: resetAll,
  };
  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.target === stage && move[event.key]) movePoint(move[event.key], event.shiftKey ? 16 : 1);
    else if (keys[event.key.toLowerCase()]) keys[event.key.toLowerCase()]();
    else return;
    event.preventDefault();
  });
  function movePoint([across, down], step) {
    const clip = (value, limit) => Math.min(Math.max(value, 0), limit - 1);
    probe = probe
      ? [clip(probe[0] + across * step, width), clip(probe[1] + down * step, height)]
      : [width >> 1, height >> 1];
    readout.setAttribute("aria-live", "polite");
    drawProbe();
  }
  stage.addEventListener("blur", () => {
    readout.removeAttribute("aria-live");
    probe = null;
    drawProbe();
  });
  for (const { area } of Object.values(steps)) {
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      const fit = Math.min(box.width / width, box.height / height);
      const x = Math.floor((event.clientX - box.left - (box.width - width * fit) / 2) / fit);
      const y = Math.floor((event.clientY - box.top - (box.height - height * fit) / 2) / fit);
      probe = x >= 0 && x < width && y >= 0 && y < height ? [x, y] : null;
      drawProbe();
    });
    area.addEventListener("pointerleave", () => {
      probe = null;
      drawProbe();
    });
  }

  // ------------------------------------------------------------------------------- loading
  async function load() {
    const [pixels, bytes] = await Promise.all([
      decode(data.image, data.mime, size).catch(() => {
        throw new Error("the picture can't be decoded");
      }),
      inflate(data.planes).catch(() => {
        throw new Error("the maps can't be decoded");
      }),
    ]);
    const full = (data.salient ? 1 : 0) + 2 * data.regions.length + predictions.length +
      (data.truth ? 1 : 0);
    const planes = unpackPlanes(bytes, [...data.grids, ...Array(full).fill(size)]);
    const scaled = (levels) => Float64Array.from(levels, (level) => level / 255);
    const maps = planes.splice(0, data.grids.length)
      .map((levels, k) => scaled(stretchLevels(levels, data.grids[k], size)));
    const saliency = data.salient ? scaled(planes.shift()) : null;
    const cut = Object.fromEntries(data.regions.map((name) => {
      const [high, low] = planes.splice(0, 2);
      const numbers = Uint16Array.from(low, (value, i) => 256 * high[i] + value);
      return [name, { numbers, count: numbers.reduce((most, value) => Math.max(most, value)) + 1 }];
    }));
    const masks = Object.fromEntries(predictions.map((name) => [name, planes.shift()]));
    loaded = { pixels, maps, saliency, regions: cut, masks, truth: planes.shift() ?? null };
    redraw();
  }

  // ------------------------------------------------------------------------------- drawing
  function draw() {
    frame = 0;
    try {
      updateControls();
      if (loaded) paint();
    } catch (error) {
      fail(error);
    }
  }

  function fail(error) {
    shown = null;
    for (const { canvas, layer } of Object.values(steps)) {
      canvas.width = 0;
      canvas.removeAttribute("aria-label");
      layer.replaceChildren();
    }
    problem.hidden = false;
    problem.textContent = `The panel can't be drawn: ${error.message ?? error}`;
  }

  function paint() {
    const at = Object.fromEntries(
      ["method", "cue", "regions", "averaged", "class_id", "prediction", "outlined", "opacity",
        "palette", ...THRESHOLDS].map((name) => [name, values.get(name)]),
    );
    at.class_id = chosenClass();
    const voted = at.method === "superpixels";
    const { numbers, count } = loaded.regions[at.regions];
    const means = voted || at.averaged
      ? once("means", [at.regions], () => loaded.maps.map((map) => regionMeans(map, numbers, count)))
      : loaded.maps;
    const source = [voted || at.averaged, voted || at.averaged ? at.regions : null];
    const spread = once("spread", source, () => means.map(spreadMap));
    const bySaliency = !voted && at.cue === "saliency";
    const cueMap = once("cue", [source, at.cue, at.power, at.constant],
      () => backgroundCue(at.cue, spread, loaded.saliency, at));
    const found = once(
      "labels", [source, at.method, at.cue, THRESHOLDS.map((name) => at[name])],
      () => named(voted
        ? voteLabels(means, at.background)
        : ruleLabels(spread, cueMap, bySaliency ? loaded.saliency : null, at)),
    );
    const mask = loaded.masks[at.prediction] ?? null;
    const scores = once("scores", [known.get("labels").key],
      () => scoreLabels(found.labels, loaded.truth));
    const theirs = mask && once("theirs", [at.prediction], () => scoreLabels(mask, loaded.truth));
    const map = (voted ? means : spread)[withMap.findIndex(({ id }) => id === at.class_id)];
    shown = { at, voted, map, cueMap, found, mask, scores, theirs, means, spread, count };

    const look = [at.opacity, at.palette];
    show(steps.picture, [], (target) => target.set(loaded.pixels));
    show(steps.maps, [source, at.method, at.class_id, look], (target) => lay(map, at, target));
    show(steps.background, [source, voted, at.cue, at.power, at.constant, at.regions, look],
      (target) => (voted
        ? paintRegions(loaded.pixels, numbers, size, target)
        : lay(cueMap, at, target)));
    show(steps.labels, [known.get("labels").key, at.opacity],
      (target) => paintLabels(loaded.pixels, found.labels, tones, at.opacity, size, target));
    if (mask)
      show(steps.network, [at.prediction, at.opacity],
        (target) => paintLabels(loaded.pixels, mask, tones, at.opacity, size, target));
    for (const step of Object.values(steps))
      setLine(step, "attnviz-outline", loaded.truth && at.outlined
        ? once("truth", [], () => borderPath(loaded.truth, size)) : "");
    write();
    drawProbe();
  }

  /** Labels by place in the maps become labels by class number. */
  function named({ labels, reasons }) {
    const table = new Uint8Array(256).fill(LEFT_OUT);
    table[0] = 0;
    withMap.forEach(({ id }, k) => (table[1 + k] = 1 + id));
    return { labels: labels.map((label) => table[label]), reasons };
  }

  function lay(map, { palette: name, opacity: weight }, target) {
    const levels = map.map((value) => Math.floor(Math.min(Math.max(value, 0), 1) * 255 + 0.5));
    overlay(loaded.pixels, levels, 255, palettes[name], weight, target);
  }

  function show(step, parts, make) {
    const key = JSON.stringify(parts);
    if (step.key === key) return;
    step.key = key;
    const image = (step.image ??= new ImageData(width, height));
    make(image.data);
    if (step.canvas.width !== width) step.canvas.width = width;
    if (step.canvas.height !== height) step.canvas.height = height;
    step.canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function setLine(step, name, d) {
    if (step.paths[name]?.d === d) return;
    step.paths[name]?.nodes.forEach((node) => node.remove());
    const nodes = d ? [element("path", { d, class: `attnviz-halo ${name}-halo` }),
      element("path", { d, class: name })] : [];
    step.layer.append(...nodes);
    step.paths[name] = { d, nodes };
  }

  const put = (node, text) => { // unchanged text costs no layout
    if (node.textContent !== text) node.textContent = text;
  };

  function write() {
    const { at, voted, scores, theirs, count } = shown;
    const name = nameOf(1 + at.class_id);
    const mean = (of) => (data.truth ? `mIoU ${shareText(of.mean)}` : "");
    put(steps.picture.under, `${width} × ${height}`);
    put(steps.maps.under, voted || at.averaged ? `${name}, averaged` : name);
    put(steps.background.heading, voted ? "Superpixels" : "Background");
    put(steps.background.under, voted ? `${count}, ${REGIONS[at.regions]}`
      : { saliency: "1 − saliency", affinity: "(1 − max)^α", constant: "constant" }[at.cue]);
    put(steps.labels.under, [mean(scores), scores.shares[LEFT_OUT] > 0 &&
      `left out ${shareText(scores.shares[LEFT_OUT])}`].filter(Boolean).join(" · "));
    if (theirs)
      put(steps.network.under, [mean(theirs), at.prediction === "network" ? "" : at.prediction]
        .filter(Boolean).join(" · "));
    const of = { labels: scores, network: theirs };
    for (const { kind, what, wanted, node } of [...rows, ...foot].flatMap(({ cells }) => cells)) {
      const value = wanted(of[kind], what);
      put(node, value === null ? "" : shareText(value));
    }
    const words = {
      picture: "the picture", maps: `map of ${name}`,
      background: voted ? `${count} superpixels` : `background by ${at.cue}`,
      labels: `pseudo labels; ${steps.labels.under.textContent}`,
      network: `the network's mask; ${steps.network?.under.textContent}`,
    };
    for (const [kind, { canvas }] of Object.entries(steps))
      if (canvas.getAttribute("aria-label") !== words[kind])
        canvas.setAttribute("aria-label", words[kind]);
  }

  function updateControls() {
    const how = values.get("method");
    const voted = how === "superpixels";
    method.update(how);
    cue.update(values.get("cue"));
    cue.list.disabled = voted;
    regions.update(values.get("regions"));
    regions.list.disabled = !voted && !values.get("averaged");
    averaged.checked = voted || values.get("averaged");
    averaged.disabled = voted;
    const used = usedThresholds();
    for (const [name, each] of Object.entries(thresholds)) {
      each.row.hidden = !used.includes(name);
      each.set(values.get(name));
    }
    reset.disabled = used.every((name) => values.get(name) === PUBLISHED[name]);
    opacity.update(values.get("opacity"));
    palette.update(values.get("palette"));
    outlined.checked = values.get("outlined");
    prediction.update(values.get("prediction"));
    for (const { label, input } of rows)
      if (input) input.checked = label - 1 === chosenClass();
  }

  // ------------------------------------------------------------- the values under the pointer
  function drawProbe() {
    if (!shown) return;
    for (const step of Object.values(steps))
      setLine(step, "attnviz-point", probe ? `M${probe[0] + 0.5} ${probe[1] + 0.5}h0` : "");
    if (!probe) {
      readout.replaceChildren(
        element("span", {}, data.truth && shown.at.outlined ? "Lines: the truth. " : "",
          "Point at a picture to read why a pixel has its label."));
      return;
    }
    const [x, y] = probe;
    const i = y * width + x;
    const value = (name, number) =>
      element("span", {}, `${name} `, element("strong", {}, number.toFixed(2)));
    const maps = shown.voted ? shown.means : shown.spread;
    readout.replaceChildren(
      element("span", { class: "attnviz-at" }, `x ${x}, y ${y}`),
      value("background", shown.voted ? shown.at.background : shown.cueMap[i]),
      ...withMap.map(({ name }, k) => value(name, maps[k][i])),
      element("span", { class: "attnviz-why" }, "→ ",
        element("strong", {}, nameOf(shown.found.labels[i])), whyOf(i)),
      loaded.truth ? element("span", {}, `truth ${nameOf(loaded.truth[i])}`) : "",
    );
  }

  function whyOf(i) {
    const { at, found } = shown;
    return ["",
      `: two exceed ${shareText(at.conflict)}`,
      ": salient, but no map wins",
      `: a map exceeds ${shareText(at.strong)}, but background wins`,
      `: objects take less than ${shareText(at.least)}`][found.reasons[i]];
  }

  // ------------------------------------------------------------------------------- a figure
  function drawFigure() {
    const [cellWidth, top, gap] = [220, 26, 10];
    const cellHeight = Math.round((cellWidth * height) / width);
    const parts = Object.values(steps).map(({ canvas, paths, heading, under }, k) => {
      const x = k * (cellWidth + gap);
      const line = paths["attnviz-outline"]?.nodes[1];
      return [
        figureText(heading.textContent, x, 16, { weight: 600 }),
        figureImage([canvas], x, top, cellWidth, cellHeight),
        line ? element("svg", { x, y: top, width: cellWidth, height: cellHeight,
          viewBox: `0 0 ${width} ${height}` }, ...figureLine(line, "#fff", { width: 1.4 })) : [],
        figureText(under.textContent, x, top + cellHeight + 17, { size: 12, fill: "#59606a" }),
      ];
    });
    const whole = parts.length * (cellWidth + gap) - gap;
    let y = top + cellHeight + 30;
    classes.forEach(({ id, name }, k) => {
      const x = (k % parts.length) * (cellWidth + gap);
      if (k && x === 0) y += 20;
      parts.push(element("rect", { x, y, width: 12, height: 12, fill: colorOf(1 + id) }),
        figureText(name, x + 18, y + 11, { size: 12 }));
    });
    const caption = figureLines(writeCaption(), 0, y + 20, whole, { size: 12, fill: "#59606a" });
    return figureOf(whole, y + 24 + caption.height, ...parts, ...caption.nodes);
  }

  /** What made the labels: the thresholds in use. */
  function writeCaption() {
    const { at, voted } = shown;
    const cut = `${at.regions} superpixels`;
    const how = voted ? `Vote of ${cut}`
      : `Rules, background by ${at.cue}${at.averaged ? `, maps averaged over ${cut}` : ""}`;
    const used = usedThresholds().map((name) => `${name} ${Number(at[name].toFixed(3))}`);
    return `${how}: ${used.join(", ")}`;
  }

  load().catch(fail);
  redraw();
  return () => {
    cancelAnimationFrame(frame);
    values.stop();
  };
}

export default drawnBy(build);

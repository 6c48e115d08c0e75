// The evolution player. Joined behind core.js, whose functions it uses.

const HIGHLIGHTS = [
  ["epoch", "in this epoch"], ["first", "since the first"], ["none", "not marked"],
];
const CURVES = [["picture", "this picture"], ["training", "training's own record"]];
const KEYS = [
  ["Space", "play, pause"], ["← →", "one epoch"], ["Home End", "first, last epoch"],
  ["+ −", "faster, slower"], ["N", "mark new pixels"], ["P", "next picture"],
  ["C", "next class"], ["?", "these keys"],
];
const ICONS = {
  first: "M4 3v10M13 3 6 8l7 5z",
  back: "M11 3 4 8l7 5z",
  play: "M4 2.5v11L13.5 8z",
  pause: "M4.5 3v10M11.5 3v10",
  next: "M5 3l7 5-7 5z",
  last: "M12 3v10M3 3l7 5-7 5z",
};
const NEW_COLOR = [0, 229, 255];
const TONES = ["#b35900", "#0b63b0", "#00754f", "#a03a7e", "#6a5acd", "#5f6670"]; // on white
const NEW_SHARE = 0.6;
const CACHED = 32e6; // bytes of levels kept for a picture
const [LEFT, RIGHT, TOP, BOTTOM, HEIGHT] = [40, 12, 8, 20, 148];

// ------------------------------------------------------------------------------ pure functions

/**
 * The maps by class, column and epoch: an epoch is stored as its difference from the one before,
 * modulo 256. Changes `bytes` in place; returns stacks[class][column][frame].
 */
export function unpackFrames(bytes, grids, counts) {
  let start = 0;
  return grids.map((columns) => columns.map(([rows, width], column) => {
    const area = rows * width;
    return Array.from({ length: counts[column] }, (_, frame) => {
      const map = bytes.subarray(start, start + area);
      if (frame) for (let i = 0; i < area; i++) map[i] += bytes[start - area + i];
      start += area;
      return map;
    });
  }));
}

/** A map resized to the picture, in 256 levels of its largest value. */
export function stretch(map, [rows, columns], [height, width]) {
  const { low, high, weight: share } = bilinear(columns, width);
  const down = bilinear(rows, height);
  const values = new Float32Array(height * width);
  const line = new Float32Array(columns);
  let peak = 0;
  for (let y = 0, i = 0; y < height; y++) {
    const [upper, lower, weight] = [down.low[y] * columns, down.high[y] * columns, down.weight[y]];
    for (let x = 0; x < columns; x++)
      line[x] = map[upper + x] + weight * (map[lower + x] - map[upper + x]);
    for (let x = 0; x < width; x++, i++) {
      const left = line[low[x]];
      const value = left + share[x] * (line[high[x]] - left);
      values[i] = value;
      if (value > peak) peak = value;
    }
  }
  const factor = peak > 0 ? 255 / peak : 0;
  const levels = new Uint8Array(values.length);
  for (let i = 0; i < levels.length; i++) levels[i] = values[i] * factor + 0.5;
  return levels;
}

/**
 * Marks the found pixels by 1, those that were not found `before` by 2; `before` may be null: none
 * is new. Returns the number of new ones.
 */
export function mark(now, before, threshold, target) {
  const limit = threshold * 255;
  let count = 0;
  for (let i = 0; i < now.length; i++) {
    target[i] = now[i] < limit ? 0 : before && before[i] < limit ? 2 : 1;
    count += target[i] >> 1;
  }
  return count;
}

/**
 * The 256 levels as color and opacity to lay over a picture, then the same for new pixels: what
 * `overlay` does to the pixels themselves, left to the browser. As RGBA in 32 bits.
 */
export function paints(colors, opacity) {
  const rgba = new Uint8ClampedArray(2048);
  for (let level = 0; level < 512; level++) {
    const fresh = level > 255 ? NEW_SHARE : 0;
    const weight = (1 - fresh) * opacity * Math.sqrt((level & 255) / 255);
    const whole = weight + fresh;
    for (let c = 0; c < 3; c++)
      rgba[4 * level + c] = whole
        ? (weight * colors[3 * (level & 255) + c] + fresh * NEW_COLOR[c]) / whole
        : 0;
    rgba[4 * level + 3] = 255 * whole;
  }
  return new Uint32Array(rgba.buffer);
}

/** Writes the paint of every pixel; `marks` says which are new. */
export function color(levels, marks, table, target) {
  for (let i = 0; i < levels.length; i++)
    target[i] = table[marks[i] === 2 ? levels[i] + 256 : levels[i]];
}

/** How many pixels are at or above each level: on the object (mask 1), and elsewhere (mask 0). */
export function countLevels(levels, mask) {
  const inside = new Float64Array(256);
  const outside = new Float64Array(256);
  for (let i = 0; i < levels.length; i++) {
    if (mask && mask[i] === 1) inside[levels[i]]++;
    else if (!mask || mask[i] === 0) outside[levels[i]]++;
  }
  for (let level = 254; level >= 0; level--) {
    inside[level] += inside[level + 1];
    outside[level] += outside[level + 1];
  }
  return { inside, outside };
}

/** Shares of the found pixels: of the picture, of the object, and not object. */
export function rates({ inside, outside }, threshold) {
  const limit = Math.ceil(threshold * 255);
  const [hit, miss] = [inside[limit], outside[limit]];
  return {
    found: (hit + miss) / (inside[0] + outside[0]),
    recall: inside[0] ? hit / inside[0] : NaN,
    noise: hit + miss ? miss / (hit + miss) : NaN,
  };
}

/** The edges of a region (values above 0) as lines between pixels: [x0, y0, x1, y1]. */
export function outline(mask, [height, width]) {
  const lines = [];
  let [first, last] = [0, mask.length - 1]; // a loop is five times as fast as findIndex
  while (first <= last && !mask[first]) first++;
  while (last > first && !mask[last]) last--;
  if (first > last) return lines;
  const sides = new Int32Array(width + 1).fill(-1); // where a vertical edge began
  const end = Math.floor(last / width) + 1;
  for (let y = Math.floor(first / width); y <= end; y++) {
    const row = y * width;
    let [left, start] = [false, -1];
    for (let x = 0; x <= width; x++) {
      const below = x < width && y < end && mask[row + x] > 0;
      const above = x < width && y > 0 && mask[row - width + x] > 0;
      if (below !== above) {
        if (start < 0) start = x;
      } else if (start >= 0) {
        lines.push([start, y, x, y]);
        start = -1;
      }
      if (below !== left) {
        if (sides[x] < 0) sides[x] = y;
      } else if (sides[x] >= 0) {
        lines.push([x, sides[x], x, y]);
        sides[x] = -1;
      }
      left = below;
    }
  }
  return lines;
}

/** The place that playing has reached: frames run by the clock, none is waited for. */
export function playhead(from, elapsed, speed, count) {
  return Math.min(from + (Math.max(elapsed, 0) * speed) / 1000, count - 1);
}

/** A round number at or above a share, for an axis. */
export function ceiling(share) {
  return [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8].find((top) => share <= top) ?? 1;
}

function percent(value) {
  return Number.isFinite(value) ? `${Math.round(value * 100)} %` : "–";
}

function toPath(lines) {
  return lines.map(([x0, y0, x1, y1]) => `M${x0} ${y0}L${x1} ${y1}`).join("");
}

// ------------------------------------------------------------------------------------ the panel

/** Builds the panel in `el`; returns what takes it away again. */
function build(model, el) {
  const data = model.get("_data");
  const { pictures, series } = data;
  const palettes = Object.fromEntries(
    Object.entries(data.palettes).map(([name, view]) => [name, bytesOf(view)]),
  );
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  const ready = new Map(); // picture number -> its pixels and maps, once decoded
  const listed = new Map();
  let frame = 0;
  let shown = null; // what the last frame drew
  let playing = null; // where and when playing began
  let probe = null; // the pointer, in [0, 1] across and down
  let chart = null; // the geometry of the curves

  const redraw = () => (frame ||= requestAnimationFrame(draw));
  const values = settings(
    model,
    ["image_index", "class_id", "epoch", "threshold", "highlight", "truth", "contour", "curve_of",
      "opacity", "palette", "speed", "stopping", "live", "_frames"],
    redraw,
  );

  // ------------------------------------------------------------------------------- elements
  const picturePicker = choice(
    "Picture", pictures.map(({ name }, index) => [index, name]), (x) => choosePicture(Number(x)),
  );
  const classPicker = choice("Class", [], (x) => values.set({ class_id: Number(x) }));
  const names = pictures.flatMap(({ classes }) => classes.map(({ name }) => name.length));
  classPicker.list.style.width = `${Math.min(Math.max(...names), 24) + 4}ch`; // one for all
  const status = element("span", { class: "attnviz-status", role: "status" });
  const stop = element("button", { type: "button", class: "attnviz-button attnviz-stop",
    onclick: () => { values.set({ stopping: true }); values.send(); } }, "Stop training");
  const root = element("div", { class: "attnviz-panel attnviz-player" });
  const end = headEnd(root, {
    keys: KEYS, figure: makeFigure, before: [status, stop],
    name: () => fileName(shown?.entry.name ?? "", shown?.picture.name ?? "", "epoch",
      values.get("epoch")),
  });
  const head = element(
    "div", { class: "attnviz-head" },
    element("span", { class: "attnviz-title" }, data.title),
    pictures.length > 1 ? picturePicker.row : null, classPicker.row,
    end,
  );

  const write = (node, text) => { // unchanged text costs no layout
    if (node.textContent !== text) node.textContent = text;
  };
  const makeColumn = (name, note, number) => {
    const below = element("canvas", { "aria-hidden": "true" });
    const canvas = element("canvas", { role: "img", class: number < 0 ? null : "attnviz-map" });
    const layer = element("svg", { "aria-hidden": "true", preserveAspectRatio: "xMidYMid meet" });
    const area = element("div", { class: "attnviz-picture" }, below, canvas, layer);
    const shares = Object.fromEntries(["recall", "noise", "found"].map((kind) => {
      const value = element("b");
      return [kind, { value, row: element("span", { hidden: true },
        element("span", { class: "attnviz-dim" }, `${kind} `), value) }];
    }));
    const numbers = element("span", { class: "attnviz-rates" },
      ...Object.values(shares).map(({ row }) => row));
    const aside = element("span", { class: "attnviz-dim attnviz-note" }, note);
    const fresh = element("span", { class: "attnviz-fresh",
      title: "newly found, share of the picture" });
    const root = element(
      "figure", { class: number < 0 ? "attnviz-column attnviz-plain" : "attnviz-column" },
      element("figcaption", {},
        number < 0 ? null : element("i", { class: "attnviz-swatch", "aria-hidden": "true" }),
        element("strong", {}, name), aside, fresh),
      area, numbers,
    );
    root.style.setProperty("--tone", `var(--tone-${number + 1})`);
    return { root, below, canvas, layer, area, aside, fresh, shares, numbers, paths: {} };
  };
  const plain = makeColumn("Picture", "", -1);
  const columns = series.map(({ name, note }, number) => makeColumn(name, note, number));
  const stage = element(
    "div", { class: "attnviz-columns", tabindex: "0", role: "group",
      "aria-label": "Evolution; space plays, the arrow keys step, ? shows all keys" },
    plain.root, ...columns.map(({ root }) => root),
  );
  stage.dataset.count = columns.length + 1;

  const icon = (name) => element("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" },
    element("path", { d: ICONS[name] }));
  const button = (name, label, onclick) => element(
    "button",
    { type: "button", class: "attnviz-button", title: label, "aria-label": label, onclick },
    icon(name),
  );
  const play = button("play", "Play", () => togglePlay());
  play.classList.add("attnviz-play");
  const [epochNumber, epochTotal] = [element("b"), element("span")];
  const epochText = element("span", { class: "attnviz-epoch" },
    "epoch ", epochNumber, " of ", epochTotal);
  const lossText = element("span", { class: "attnviz-dim attnviz-loss" });
  const speed = choice("Speed", data.speeds.map((x) => [x, `${x} / s`]),
    (x) => changeSpeed(Number(x)));
  const transport = element(
    "div", { class: "attnviz-transport" },
    button("first", "First epoch", () => goTo(0)),
    button("back", "One epoch back", () => step(-1)),
    play,
    button("next", "One epoch on", () => step(1)),
    button("last", "Last epoch", () => goTo(Infinity)),
    epochText, lossText, speed.row,
  );

  const curves = element("svg", { class: "attnviz-curves", role: "img" });
  const cursor = element("i", { class: "attnviz-cursor", "aria-hidden": "true" });
  const scrub = element("input", { type: "range", class: "attnviz-scrub", "aria-label": "Epoch",
    step: 1 });
  scrub.addEventListener("input", () => goToEpoch(Number(scrub.value)));
  const legend = element("span", { class: "attnviz-legend" });
  const curveOf = choice("Curves of", CURVES, (x) => values.set({ curve_of: x }));
  const timeline = element(
    "div", { class: "attnviz-timeline" },
    element("div", { class: "attnviz-legend-row" }, legend, curveOf.row),
    element("div", { class: "attnviz-chart" }, cursor, curves), scrub,
  );
  const readout = element("div", { class: "attnviz-readout" });

  const threshold = slider("Found from", {
    min: 0.01, max: 0.99, step: 0.01, show: percent, onset: (x) => values.set({ threshold: x }),
  });
  threshold.row.classList.add("attnviz-ramp");
  threshold.row.title = "A pixel counts as found from this share of its map's maximum";
  const highlight = choice("New pixels", HIGHLIGHTS, (x) => values.set({ highlight: x }));
  const truth = element("input", { type: "checkbox" });
  truth.addEventListener("change", () => values.set({ truth: truth.checked }));
  const contour = element("input", { type: "checkbox" });
  contour.addEventListener("change", () => values.set({ contour: contour.checked }));
  const opacity = slider("Opacity", {
    min: 0, max: 1, step: 0.01, show: percent, onset: (x) => values.set({ opacity: x }),
  });
  const palette = choice(
    "Colors", Object.keys(palettes).map((name) => [name, name]), (x) => values.set({ palette: x }),
  );
  const masked = pictures.some(({ classes }) => classes.some((entry) => entry.masked));
  const controls = element(
    "div", { class: "attnviz-options" }, threshold.row, opacity.row,
    element("div", { class: "attnviz-row" }, highlight.row, palette.row,
      element("label", { class: "attnviz-check" }, contour, "Outline what is found"),
      masked ? element("label", { class: "attnviz-check" }, truth, "Outline the object") : null),
  );
  const problem = element("div", { class: "attnviz-error", role: "alert", hidden: true });
  const skipped = element("div", { class: "attnviz-error", hidden: true });
  root.append(problem, skipped, head, stage, readout, transport, timeline, controls);
  root.style.setProperty(
    "--ratio", Math.min(...pictures.map(({ width, height }) => width / height)),
  );
  el.replaceChildren(root);
  root.addEventListener("change", values.send); // a control was let go

  // ----------------------------------------------------------------------------- behaviour
  function choosePicture(index) {
    const known = pictures[index].classes.some(({ id }) => id === values.get("class_id"));
    values.set({
      image_index: index,
      class_id: known ? values.get("class_id") : pictures[index].classes[0].id,
    });
  }

  function entryOf(picture) {
    const wanted = values.get("class_id");
    return picture.classes.find(({ id }) => id === wanted) ?? picture.classes[0];
  }

  const frames = () => ready.get(values.get("image_index"))?.frames ?? model.get("_frames");

  /** The place of the epoch in the list of recorded ones. */
  function place() {
    const { epochs } = frames();
    const at = epochs.findLastIndex((epoch) => epoch <= values.get("epoch"));
    return Math.max(at, 0);
  }

  function goTo(index) {
    pause();
    const { epochs } = frames();
    if (!epochs.length) return;
    values.set({ epoch: epochs[Math.min(Math.max(index, 0), epochs.length - 1)] });
  }

  function goToEpoch(epoch) {
    goTo(frames().epochs.findLastIndex((other) => other <= epoch));
  }

  function step(by) {
    goTo(place() + by);
  }

  function togglePlay() {
    if (playing) return pause();
    const last = frames().epochs.length - 1;
    if (last < 1) return undefined;
    playing = { from: place() < last ? place() : 0, since: null };
    return redraw();
  }

  function pause() {
    if (!playing) return;
    playing = null;
    values.send();
    redraw();
  }

  function changeSpeed(value) {
    if (playing) playing = { from: playing.at ?? place(), since: null };
    values.set({ speed: value });
  }

  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { target, key } = event;
    if (target.tagName === "SELECT") return;
    const other = target.tagName === "INPUT" && target !== scrub;
    const moves = {
      ArrowLeft: () => step(-1), ArrowRight: () => step(1),
      Home: () => goTo(0), End: () => goTo(Infinity),
      " ": () => target.tagName === "BUTTON" || togglePlay(),
    };
    const cycle = ["epoch", "first", "none"];
    const nextOf = (list, value) => list[(list.indexOf(value) + 1) % list.length];
    const faster = (by) => {
      const at = data.speeds.indexOf(values.get("speed")) + by;
      if (data.speeds[at]) changeSpeed(data.speeds[at]);
    };
    const anywhere = {
      "+": () => faster(1), "=": () => faster(1), "-": () => faster(-1), "−": () => faster(-1),
      n: () => values.set({ highlight: nextOf(cycle, values.get("highlight")) }),
      p: () => choosePicture((values.get("image_index") + 1) % pictures.length),
      c: () => {
        const ids = pictures[values.get("image_index")].classes.map(({ id }) => id);
        values.set({ class_id: nextOf(ids, values.get("class_id")) });
      },
    };
    const act = (other ? null : moves[key]) ?? anywhere[key.length > 1 ? key : key.toLowerCase()];
    if (!act || (target.tagName === "BUTTON" && key === " ")) return;
    event.preventDefault();
    act();
  });
  const scrubAt = (event) => {
    if (!chart) return;
    const box = curves.getBoundingClientRect();
    goToEpoch(Math.round(chart.epochAt(event.clientX - box.left)));
  };
  curves.addEventListener("pointerdown", (event) => {
    curves.setPointerCapture(event.pointerId);
    scrubAt(event);
  });
  curves.addEventListener("pointermove", (event) => {
    if (curves.hasPointerCapture(event.pointerId)) scrubAt(event);
  });
  curves.addEventListener("pointerup", values.send);

  for (const { area } of [plain, ...columns]) {
    area.addEventListener("pointermove", (event) => {
      if (!shown) return;
      const { width, height } = shown.picture;
      const box = area.getBoundingClientRect();
      const fit = Math.min(box.width / width, box.height / height);
      const across = (event.clientX - box.left - (box.width - width * fit) / 2) / (width * fit);
      const down = (event.clientY - box.top - (box.height - height * fit) / 2) / (height * fit);
      probe = across >= 0 && across < 1 && down >= 0 && down < 1 ? [across, down] : null;
      drawProbe();
    });
    area.addEventListener("pointerleave", () => {
      probe = null;
      drawProbe();
    });
  }

  // ------------------------------------------------------------------------------- loading
  async function load(index, grown) {
    const picture = pictures[index];
    const size = [picture.height, picture.width];
    const before = ready.get(index);
    const [pixels, masks, maps] = await Promise.all([
      before?.pixels ?? decode(picture.image, picture.mime, size).catch(() => {
        throw new Error(`the picture ${picture.name} can't be decoded`);
      }),
      before?.masks ?? inflate(picture.masks).then((bytes) => splitMasks(bytes, picture)),
      inflate(grown.maps[index]).catch(() => {
        throw new Error(`the maps of ${picture.name} can't be decoded`);
      }),
    ]);
    const grids = picture.classes.map((entry) => entry.grids);
    ready.set(index, {
      frames: grown, size, pixels, masks,
      stacks: unpackFrames(maps, grids, grown.counts),
      levels: new Map(), counts: new Map(), counted: new Set(), contours: new Map(),
    });
    redraw();
  }

  function splitMasks(bytes, { classes, width, height }) {
    let start = 0;
    return classes.map(({ masked }) => {
      if (!masked) return null;
      const mask = bytes.subarray(start, (start += width * height));
      const object = mask.map((value) => value === 1);
      return {
        mask,
        path: toPath(outline(object, [height, width])),
        share: object.reduce((sum, value) => sum + value) / object.length,
      };
    });
  }

  /** The levels of a column's frame over the picture; a few hundred are kept. */
  function levelsOf(loaded, k, column, at) {
    const key = `${k}:${column}:${at}`;
    let levels = loaded.levels.get(key);
    if (levels) loaded.levels.delete(key); // last used, last dropped
    const grid = pictures[values.get("image_index")].classes[k].grids[column];
    levels ??= at < 0
      ? new Uint8Array(loaded.size[0] * loaded.size[1])
      : stretch(loaded.stacks[k][column][at], grid, loaded.size);
    loaded.levels.set(key, levels);
    if (loaded.levels.size * levels.length > CACHED)
      loaded.levels.delete(loaded.levels.keys().next().value);
    return levels;
  }

  function countsOf(loaded, k, column, at) {
    const key = `${k}:${column}:${at}`;
    if (!loaded.counts.has(key))
      loaded.counts.set(key, countLevels(levelsOf(loaded, k, column, at), loaded.masks[k]?.mask));
    return loaded.counts.get(key);
  }

  function contourOf(loaded, k, column, at, marks) {
    const key = `${k}:${column}:${at}`;
    if (loaded.contours.threshold !== shown.look.threshold) loaded.contours.clear();
    loaded.contours.threshold = shown.look.threshold;
    if (!loaded.contours.has(key)) loaded.contours.set(key, toPath(outline(marks, loaded.size)));
    return loaded.contours.get(key);
  }

  /** Counts for a few milliseconds; true once every epoch of a class is counted. */
  function countSome(loaded, k, budget) {
    if (loaded.counted.has(k)) return true;
    const until = performance.now() + budget;
    for (const [column, count] of loaded.frames.counts.entries())
      for (let at = 0; at < count; at++) {
        if (loaded.counts.has(`${k}:${column}:${at}`)) continue;
        if (performance.now() > until) return false;
        countsOf(loaded, k, column, at);
      }
    loaded.counted.add(k);
    return true;
  }

  // ------------------------------------------------------------------------------- drawing
  function draw(now) {
    frame = 0;
    try {
      if (playing) advance(now);
      problem.hidden = true;
      paint();
    } catch (error) {
      fail(error);
    }
    if (playing) redraw();
  }

  function fail(error) {
    shown = playing = null;
    root.classList.remove("attnviz-loading");
    for (const column of [plain, ...columns]) {
      column.canvas.width = column.below.width = 0; // not the picture before
      column.canvas.removeAttribute("aria-label");
      column.layer.replaceChildren();
      Object.assign(column, { paths: {}, picture: null });
    }
    problem.hidden = false;
    problem.textContent = `The panel can't be drawn: ${error.message ?? error}`;
  }

  function advance(now) {
    const { epochs } = frames();
    playing.since ??= now;
    playing.at = playhead(playing.from, now - playing.since, values.get("speed"), epochs.length);
    const epoch = epochs[Math.floor(playing.at)];
    if (epoch !== values.get("epoch")) values.set({ epoch }, false);
    if (playing.at >= epochs.length - 1) pause();
  }

  function paint() {
    const index = values.get("image_index");
    const picture = pictures[index];
    const grown = model.get("_frames");
    let loaded = ready.get(index);
    if (loaded?.frames !== grown && loaded?.coming !== grown) {
      if (!loaded) ready.set(index, (loaded = {}));
      loaded.coming = grown;
      load(index, grown).catch((error) => {
        ready.set(index, { error, frames: grown });
        redraw();
      });
    }
    root.classList.toggle("attnviz-loading", !loaded.pixels);
    if (loaded.error) throw loaded.error;
    const entry = entryOf(picture);
    updateControls(index, picture, entry);
    if (!loaded.pixels) return;

    const k = picture.classes.indexOf(entry);
    const at = loaded.frames.epochs.length ? place() : -1;
    const look = Object.fromEntries(
      ["threshold", "highlight", "truth", "contour", "opacity", "palette"].map(
        (name) => [name, values.get(name)],
      ),
    );
    const drawn = JSON.stringify([index, k, at, look]);
    if (drawn !== shown?.drawn || loaded !== shown.loaded) {
      shown = { ...shown, picture, entry, loaded, k, at, look, drawn };
      shown.levels = [];
      drawPlain();
      for (const number of columns.keys()) drawColumn(number);
      drawProbe();
    }
    const whole = countSome(loaded, k, playing ? 3 : 8);
    drawCurves(whole);
    drawCursor();
    if (!whole) redraw();
  }

  function show(surface, image) {
    if (surface.width !== image.width) surface.width = image.width;
    if (surface.height !== image.height) surface.height = image.height;
    surface.getContext("2d").putImageData(image, 0, 0);
  }

  function setPath(column, name, d) {
    if (column.paths[name]?.d === d) return;
    column.paths[name]?.nodes.forEach((node) => node.remove());
    const halo = element("path", { d, class: `attnviz-halo ${name}-halo` });
    const nodes = d ? [halo, element("path", { d, class: name })] : [];
    column.layer.append(...nodes);
    column.paths[name] = { d, nodes };
  }

  function drawTruth(column) {
    const { picture, loaded, k, look } = shown;
    column.layer.setAttribute("viewBox", `0 0 ${picture.width} ${picture.height}`);
    setPath(column, "attnviz-outline", look.truth ? loaded.masks[k]?.path ?? "" : "");
  }

  function showPicture(column) {
    const { picture, loaded } = shown;
    if (column.picture === picture) return;
    column.picture = picture;
    show(column.below, new ImageData(loaded.pixels, picture.width, picture.height));
  }

  function table({ palette: name, opacity: weight }) {
    const key = `${name} ${weight}`;
    if (listed.get("paints") !== key) listed.set("paints", key).set("table",
      paints(palettes[name], weight));
    return listed.get("table");
  }

  function drawPlain() {
    const { picture, loaded } = shown;
    showPicture(plain);
    plain.canvas.setAttribute("aria-label", `the picture ${picture.name}`);
    drawTruth(plain);
    const share = loaded.masks[shown.k]?.share;
    plain.numbers.title = "share of the picture";
    write(plain.numbers, share === undefined ? "" : `object ${percent(share)}`);
  }

  function drawColumn(number) {
    const { picture, loaded, k, at, look, entry } = shown;
    const column = columns[number];
    const places = loaded.frames.frames[number];
    const here = at < 0 ? -1 : places[at];
    const levels = (shown.levels[number] = levelsOf(loaded, k, number, here));
    column.image ??= new ImageData(picture.width, picture.height);
    if (column.image.width !== picture.width || column.image.height !== picture.height)
      column.image = new ImageData(picture.width, picture.height);
    showPicture(column);

    let before = null;
    if (series[number].grows && look.highlight !== "none" && at > 0 && here >= 0) {
      const then = look.highlight === "epoch" ? places[at - 1] : 0;
      if (then >= 0) before = levelsOf(loaded, k, number, then);
    }
    if (column.marks?.length !== levels.length) column.marks = new Uint8Array(levels.length);
    const { marks } = column;
    const added = mark(levels, before, look.threshold, marks);
    color(levels, marks, table(look), new Uint32Array(column.image.data.buffer));
    show(column.canvas, column.image);
    drawTruth(column);
    setPath(column, "attnviz-contour",
      look.contour && here >= 0 ? contourOf(loaded, k, number, here, marks) : "");
    const said = writeNumbers(number, here, added);
    const epoch = here < 0 ? "no epoch yet" : `epoch ${loaded.frames.epochs[at]}`;
    column.canvas.setAttribute("aria-label",
      `${series[number].name} of ${entry.name}, ${epoch}; ${said}`);
  }

  function writeNumbers(number, here, added) {
    const { loaded, k, at, look, entry } = shown;
    const column = columns[number];
    const share = here < 0 ? {} : rates(countsOf(loaded, k, number, here), look.threshold);
    const kinds = kindsOf(entry);
    for (const [kind, { row, value }] of Object.entries(column.shares)) {
      row.hidden = !kinds.includes(kind);
      write(value, percent(share[kind]));
    }
    const more = (100 * added) / (loaded.size[0] * loaded.size[1]);
    const text = more < 0.1 ? "< 0.1" : `+${more < 10 ? more.toFixed(1) : Math.round(more)}`;
    write(column.fresh, added ? `${text} %` : "");
    const gates = loaded.frames.gates[values.get("image_index")][k][number];
    const { name, note, grows } = series[number];
    const late = loaded.frames.frames[number].lastIndexOf(here) !== at &&
      loaded.frames.frames[number].indexOf(here) !== at;
    const gate = grows ? "" : gates.accepted[here] ? ", accepted" : "";
    const missing = here < 0 ? "no epoch yet" : late ? "no record of this epoch" : null;
    write(column.aside, missing ?? `${note}${gate}`);
    const score = gates.scores[here];
    column.aside.title = score === null || score === undefined ? name : `class score ${score}`;
    return kinds.map((kind) => `${kind} ${percent(share[kind])}`).join(", ");
  }

  // -------------------------------------------------------------------------- the timeline
  const chartValues = () => {
    const { loaded, k, look, entry } = shown;
    const fromTraining = values.get("curve_of") === "training" && recorded(loaded.frames);
    const kinds = fromTraining || entry.masked ? ["recall", "noise"] : ["found"];
    const lines = series.map((_, number) => {
      const list = loaded.frames.frames[number];
      return Object.fromEntries(kinds.map((kind) => [kind, list.map((here, at) => {
        if (fromTraining) return loaded.frames.training[number][kind][at] ?? NaN;
        const counts = here < 0 ? null : loaded.counts.get(`${k}:${number}:${here}`);
        return counts ? rates(counts, look.threshold)[kind] : NaN;
      })]));
    });
    return { kinds, lines, fromTraining };
  };

  const recorded = ({ training }) =>
    training.some(({ recall }) => recall.some((value) => value !== null));

  function drawCurves(whole) {
    const { loaded, k, look } = shown;
    const width = Math.max(timeline.clientWidth, 120);
    const key = JSON.stringify([width, k, values.get("image_index"), look.threshold,
      values.get("curve_of"), whole || loaded.counts.size]);
    if (chart?.key === key && chart.loaded === loaded) return;
    const { epochs, planned } = loaded.frames;
    const { kinds, lines, fromTraining } = chartValues();
    const first = epochs[0] ?? 1;
    const last = Math.max(planned, epochs.at(-1) ?? 1, first + 1);
    const all = lines.flatMap((line) => Object.values(line).flat()).filter(Number.isFinite);
    const top = kinds[0] === "found" ? ceiling(Math.max(0, ...all)) : 1;
    const plot = [width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM];
    const x = (epoch) => LEFT + ((epoch - first) / (last - first)) * plot[0];
    const y = (share) => TOP + (1 - share / top) * plot[1];
    const text = (label, attributes) => {
      const node = element("text", attributes);
      node.textContent = label;
      return node;
    };
    const grid = [0, 0.5, 1].flatMap((share) => [
      element("path", { class: "attnviz-grid", d: `M${LEFT} ${y(share * top)}h${plot[0]}` }),
      text(percent(share * top), { x: LEFT - 6, y: y(share * top) + 4, "text-anchor": "end" }),
    ]);
    const every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
      .find((by) => (last - first) / by <= plot[0] / 46) ?? 5000;
    const ticks = [];
    for (let epoch = Math.ceil(first / every) * every; epoch <= last; epoch += every)
      ticks.push(text(epoch, { x: x(epoch), y: HEIGHT - 5, "text-anchor": "middle" }));
    if (every > 1 && x(Math.ceil(first / every) * every) - x(first) > 24)
      ticks.unshift(text(first, { x: x(first), y: HEIGHT - 5, "text-anchor": "middle" }));
    const drawn = lines.flatMap((line, number) => kinds.toReversed().map((kind) => {
      let d = "";
      let pen = "M";
      line[kind].forEach((value, at) => {
        if (!Number.isFinite(value)) return (pen = "M");
        d += `${pen}${x(epochs[at]).toFixed(1)} ${y(value).toFixed(1)}`;
        return (pen = "L");
      });
      const node = element("path", { d, class: `attnviz-line attnviz-${kind}` });
      node.style.setProperty("--tone", `var(--tone-${number + 1})`);
      return node;
    }));
    const dots = lines.map((_, number) => {
      const dot = element("circle", { r: 4, class: "attnviz-dot" });
      dot.style.setProperty("--tone", `var(--tone-${number + 1})`);
      return dot;
    });
    curves.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    curves.replaceChildren(...grid, ...ticks, ...drawn, ...dots);
    chart = {
      key, loaded, x, y, kinds, lines, dots,
      epochAt: (place) => first + ((place - LEFT) / plot[0]) * (last - first),
    };
    scrub.min = first;
    scrub.max = last;
    scrub.value = values.get("epoch");
    const words = { recall: "recall", noise: "noise", found: "share of the picture found" };
    const suffix = fromTraining ? "recorded at 50 %" : "";
    legend.replaceChildren(
      ...columns.map((column, number) => {
        const dot = element("i", { class: "attnviz-swatch" });
        dot.style.setProperty("--tone", `var(--tone-${number + 1})`);
        return element("span", { class: "attnviz-key attnviz-who" }, dot, series[number].name);
      }),
      ...kinds.map((kind) => element("span", { class: "attnviz-key" },
        element("svg", { viewBox: "0 0 26 8", "aria-hidden": "true" },
          element("path", { d: "M1 4h24", class: `attnviz-line attnviz-${kind}` })), words[kind])),
      suffix ? element("span", { class: "attnviz-dim" }, suffix) : "",
    );
    curveOf.row.hidden = !recorded(loaded.frames);
  }

  function drawCursor() {
    const { loaded, at } = shown;
    const { epochs, planned, training } = loaded.frames;
    const total = Math.max(planned, epochs.at(-1) ?? 0);
    const epoch = at < 0 ? 0 : epochs[at];
    let spot = epoch;
    if (playing?.at !== undefined && !calm.matches) {
      const low = Math.floor(playing.at);
      spot = epochs[low] + (playing.at - low) * ((epochs[low + 1] ?? epochs[low]) - epochs[low]);
    }
    cursor.style.transform = `translateX(${chart.x(Math.max(spot, chart.epochAt(LEFT)))}px)`;
    if (chart.at !== at) {
      chart.at = at;
      chart.dots.forEach((dot, number) => {
        const value = chart.lines[number][chart.kinds[0]][at];
        dot.style.display = Number.isFinite(value) ? "" : "none";
        if (Number.isFinite(value)) {
          dot.setAttribute("cx", chart.x(epoch));
          dot.setAttribute("cy", chart.y(value));
        }
      });
      if (Number(scrub.value) !== epoch) scrub.value = epoch;
      const numbers = series.map(({ name }, number) =>
        `${name} ${chart.kinds[0]} ${percent(chart.lines[number][chart.kinds[0]][at])}`);
      scrub.setAttribute("aria-valuetext", `epoch ${epoch} of ${total}; ${numbers.join(", ")}`);
      curves.setAttribute("aria-label", `Curves over ${epochs.length} epochs; at epoch ${epoch}: ` +
        numbers.join(", "));
      write(epochNumber, `${epoch || "–"}`);
      write(epochTotal, `${total}`);
      epochText.style.setProperty("--digits", `${13 + 2 * String(total).length}ch`);
      const parts = [["loss", "loss", 3], ["precision", "mAP", 3]].map(([name, label, digits]) => {
        const value = training.find((run) => run[name][at] !== null)?.[name][at];
        return value === null || value === undefined ? "" : `${label} ${value.toFixed(digits)}`;
      });
      write(lossText, series.length <= 2 ? parts.filter(Boolean).join(" · ") : "");
    }
  }

  // ------------------------------------------------------------------------------ controls
  function updateControls(index, picture, entry) {
    picturePicker.update(index);
    if (listed.get("index") !== index) {
      listed.set("index", index);
      classPicker.fill(picture.classes.map(({ id, name }) => [id, name]));
    }
    classPicker.update(entry.id);
    threshold.update(values.get("threshold"));
    opacity.update(values.get("opacity"));
    highlight.update(values.get("highlight"));
    palette.update(values.get("palette"));
    speed.update(values.get("speed"));
    curveOf.update(values.get("curve_of"));
    truth.checked = values.get("truth");
    contour.checked = values.get("contour");
    truth.disabled = !entry.masked;
    paintRamp(values.get("palette"));
    const state = playing ? "Pause" : "Play";
    if (play.title !== state) {
      play.title = state;
      play.setAttribute("aria-label", state);
      play.replaceChildren(icon(state.toLowerCase()));
    }
    const grown = model.get("_frames");
    const [live, stopping] = [values.get("live"), values.get("stopping")];
    const said = JSON.stringify([grown.epochs.length, live, stopping, grown.skipped]);
    if (listed.get("said") === said) return;
    listed.set("said", said);
    const count = grown.epochs.length;
    const last = grown.epochs.at(-1) ?? 0;
    const short = last < grown.planned;
    status.replaceChildren(
      live ? element("i", { class: "attnviz-live", "aria-hidden": "true" }) : "",
      live && stopping ? "stopping at the next step"
        : live ? (count ? `following, ${last} of ${grown.planned}` : "waiting for the first epoch")
          : short ? `ended at ${last} of ${grown.planned} epochs` : "",
    );
    stop.hidden = !live;
    stop.disabled = stopping;
    skipped.hidden = !grown.skipped.length;
    skipped.textContent = grown.skipped.slice(0, 3).join("; ") +
      (grown.skipped.length > 3 ? `; and ${grown.skipped.length - 3} more` : "");
  }

  function paintRamp(name) {
    if (listed.get("palette") === name) return;
    listed.set("palette", name);
    root.style.setProperty("--ramp", rampOf(palettes[name]));
  }

  // ----------------------------------------------------------------- the view for a paper
  function makeFigure() {
    if (!shown || !chart) throw new Error("nothing is drawn yet");
    const { picture, entry, loaded, k, at, look } = shown;
    const [cell, gap] = [224, 12];
    const fit = cell / Math.max(picture.width, picture.height);
    const [width, height] = [picture.width * fit, picture.height * fit];
    const step = Math.max(width, 168) + gap;
    const all = [plain, ...columns];
    const wide = gap + all.length * step;
    const top = 46;
    const epoch = at < 0 ? "no epoch yet" : `epoch ${loaded.frames.epochs[at]}`;
    const line = (d, x, color, thick) => figureLine(element("path", {
      d, transform: `translate(${x} ${top}) scale(${fit})`,
    }), color, { width: thick });
    const parts = all.map((column, n) => {
      const x = gap + n * step;
      const name = n ? series[n - 1].name : entry.name;
      return [
        n ? element("rect", { x, y: 29, width: 10, height: 10, rx: 3, fill: TONES[n - 1] }) : [],
        figureText(name, x + (n ? 15 : 0), 39, { weight: 600 }),
        figureImage(n ? [column.below, column.canvas] : [column.below], x, top, width, height),
        look.truth && loaded.masks[k] ? line(loaded.masks[k].path, x, "#fff", 1.6) : [],
        column.paths["attnviz-contour"]?.d
          ? line(column.paths["attnviz-contour"].d, x, "#00e5ff", 1.6) : [],
        figureText(n ? kindsOf(entry).map((kind) =>
          `${kind} ${column.shares[kind].value.textContent}`).join(" · ") : "",
          x, top + height + 16, { size: 12, fill: "#59606a" }),
      ];
    });
    const y = top + height + 34;
    const { width: drawn } = curves.viewBox.baseVal;
    const scale = (wide - 2 * gap) / drawn;
    const dress = (node) => {
      const made = node.cloneNode(true);
      const tone = TONES[Number(/tone-(\d)/.exec(node.getAttribute("style") ?? "")?.[1] ?? 1) - 1];
      const hidden = node.style.display === "none";
      for (const name of ["class", "style"]) made.removeAttribute(name);
      const looks = {
        "attnviz-grid": { stroke: "#d8dce2", fill: "none" },
        "attnviz-line": { stroke: tone, fill: "none", "stroke-width": 2 },
        "attnviz-noise": { "stroke-width": 1.5, "stroke-dasharray": "4 3" },
        "attnviz-dot": { fill: tone, stroke: "#fff", "stroke-width": 2 },
      };
      if (node.tagName === "text") Object.assign(looks, { text: { fill: "#59606a", "font-size": 11 } });
      for (const name of [...node.classList, node.tagName])
        for (const [key, value] of Object.entries(looks[name] ?? {})) made.setAttribute(key, value);
      return hidden ? [] : made;
    };
    const cursorAt = at < 0 ? [] : element("path", { stroke: "#1f2328", "stroke-width": 1.5,
      d: `M${chart.x(loaded.frames.epochs[at])} ${TOP}V${HEIGHT - BOTTOM}` });
    const words = `${chart.kinds.join(" (solid) and ")}${chart.kinds[1] ? " (dashed)" : ""} by epoch`;
    return figureOf(wide, y + HEIGHT * scale + 8, parts,
      figureText(`${data.title}, ${picture.name}, ${epoch}`, gap, 20, { weight: 600 }),
      element("g", { transform: `translate(${gap} ${y}) scale(${scale})` },
        ...[...curves.children].flatMap(dress), ...[cursorAt].flat()),
      figureText(words, wide - gap, y, { size: 11, anchor: "end", fill: "#59606a" }));
  }

  const kindsOf = (entry) => (entry.masked ? ["recall", "noise"] : ["found"]);

  function sayLines() {
    const key = (name, text) => element("span", { class: "attnviz-key" },
      element("i", { class: `${name}-key` }), text);
    const grows = series.some((each) => each.grows) && values.get("highlight") !== "none";
    return [
      values.get("contour") ? key("attnviz-contour", "found") : "",
      grows ? key("attnviz-fresh", "newly found") : "",
      values.get("truth") && shown?.entry.masked ? key("attnviz-outline", "the object") : "",
      element("span", { class: "attnviz-hint" }, "Point at a picture for values."),
    ];
  }

  function drawProbe() {
    const at = probe && shown &&
      [probe[0] * shown.picture.width, probe[1] * shown.picture.height].map(Math.floor);
    for (const column of [plain, ...columns])
      setPath(column, "attnviz-point", at ? `M${at[0] + 0.5} ${at[1] + 0.5}h0` : "");
    if (!at) {
      const lines = JSON.stringify(["contour", "truth", "highlight"].map(values.get)) +
        shown?.entry.masked;
      if (listed.get("readout") !== lines) readout.replaceChildren(...sayLines());
      listed.set("readout", lines);
      return;
    }
    const [x, y] = at;
    listed.delete("readout");
    readout.replaceChildren(
      element("span", { class: "attnviz-hint" }, `x ${x}, y ${y}`),
      ...series.map(({ name }, number) => {
        const value = shown.levels[number][y * shown.picture.width + x] / 255;
        return element("span", {}, `${name} `, element("strong", {}, value.toFixed(2)));
      }),
      element("span", { class: "attnviz-dim attnviz-hint" }, "of the maximum"),
    );
  }

  const resized = new ResizeObserver(redraw);
  resized.observe(timeline);
  redraw();
  return () => {
    cancelAnimationFrame(frame);
    resized.disconnect();
    values.stop();
  };
}

export default drawnBy(build);

// The evidence explorer: a tree of channels that grows on click. Joined behind core.js.

const ACCENT = "#1264c4"; // of a figure, on white
const THUMB = 56; // side of a node's picture, in pixels of the page
const CARD = { width: 122, height: 60 };
const CLASS_WIDTH = 164; // the class has a longer name
const GAP = 62; // between columns, room for the edges
const ROW = 70;
const SHARP = 2; // pixels drawn for one pixel of the page
const ZOOM = [0.25, 2];
const READABLE = [0.7, 1]; // zoom at first
const KEYS = [
  ["← →", "parent; open, then first channel"],
  ["↑ ↓", "channel above, below"],
  ["Home End", "class, last channel of the column"],
  ["Enter", "open or close"],
  ["*", "open all channels of the column"],
  ["+ − 0", "zoom, fit"],
  ["C", "crop to receptive field"],
  ["Tab", "other class, link, settings"],
  ["drag", "move; Ctrl and wheel zooms"],
  ["?", "these keys"],
];
const PATIENCE = 20_000; // milliseconds until a silent kernel is reported

/** A link such as "208/5:112/4:57" as its class and its channels, or null if it is none. */
export function parseLink(link) {
  const [first, ...rest] = link.trim().split("/");
  const steps = rest.map((part) => /^(\d+):(\d+)$/.exec(part)?.[0] ?? null);
  return /^\d+$/.test(first) && !steps.includes(null) ? { classId: Number(first), steps } : null;
}

/**
 * The nodes that are visible, parents before children. `families` holds the children of a node by
 * its id, those of a class by "class:ID"; `opened` the links of the open nodes.
 */
export function visibleNodes(families, nodes, classId, opened, { top, last_stage: last }, stages) {
  const found = [];
  const visit = (record) => {
    found.push(record);
    const { link, key, depth } = record;
    const family = families.get(key);
    const stage = record.node?.stage ?? Math.max(...stages) + 1;
    const below = stages.filter((other) => other < stage && other >= last);
    record.leaf = below.length === 0;
    record.input = stage === Math.min(...stages); // shows the pixels that it sees
    record.open = !record.leaf && opened.has(link) && family !== undefined;
    record.children = [];
    if (!record.open) return;
    const children = family.children
      .filter((child) => nodes.get(child.id).stage >= last).slice(0, top);
    children.forEach((edge, index) => {
      const node = nodes.get(edge.id);
      const child = { link: `${link}/${node.stage}:${node.channel}`, key: edge.id, node, edge,
        parent: record, depth: depth + 1, index, count: children.length,
        column: 1 + stages.indexOf(node.stage) };
      record.children.push(child);
      visit(child);
    });
  };
  visit({ link: String(classId), key: `class:${classId}`, node: null, edge: null, parent: null,
    depth: 0, index: 0, count: 1, column: 0 });
  return found;
}

/** Where a column begins; column 0 is the class. */
function columnPlace(column) {
  return column ? CLASS_WIDTH + GAP + (column - 1) * (CARD.width + GAP) : 0;
}

/** Gives every visible node its place: leaves in rows, a parent in the middle of its children. */
export function placeNodes(records) {
  let row = 0;
  let before = null; // the parent of the leaf above
  for (const record of records) {
    record.x = columnPlace(record.column);
    record.width = record.column ? CARD.width : CLASS_WIDTH;
    if (record.children.length) continue;
    if (before && before !== record.parent) row += 0.18;
    record.y = row * ROW;
    before = record.parent;
    row += 1;
  }
  for (const record of [...records].reverse())
    if (record.children.length) record.y = (record.children[0].y + record.children.at(-1).y) / 2;
  const width = Math.max(...records.map((record) =>
    record.x + record.width + (record.input ? GAP + THUMB : 0)));
  const height = Math.max(...records.map(({ y }) => y)) + CARD.height;
  return { width, height };
}

/** The curve of an edge, from the right of the parent to the left of the child. */
export function edgeCurve(from, to) {
  const [x0, y0] = [from.x + from.width, from.y + CARD.height / 2];
  const [x1, y1] = [to.x, to.y + CARD.height / 2];
  const bend = GAP * 0.55;
  return `M${x0} ${y0}C${x0 + bend} ${y0} ${x1 - bend} ${y1} ${x1} ${y1}`;
}

/** The width of an edge in pixels: proportional to its share, the largest one 12 wide. */
export function edgeWidth(share, largest) {
  return Math.max((12 * share) / largest, 0.75);
}

/** The picture, then its halves, quarters ... : what a crop is read from when it is reduced. */
export function pyramid(pixels, [height, width]) {
  const levels = [{ pixels, height, width }];
  for (;;) {
    const { pixels: old, height: rows, width: columns } = levels.at(-1);
    const [h, w] = [rows >> 1, columns >> 1];
    if (Math.min(h, w) < 8) return levels;
    const half = new Uint8ClampedArray(4 * h * w);
    for (let y = 0, i = 0; y < h; y++)
      for (let x = 0; x < w; x++)
        for (let c = 0; c < 4; c++, i++) {
          const at = 4 * (2 * y * columns + 2 * x) + c;
          const below = at + 4 * columns;
          half[i] = (old[at] + old[at + 4] + old[below] + old[below + 4] + 2) >> 2;
        }
    levels.push({ pixels: half, height: h, width: w });
  }
}

/** Where `count` pixels of a crop from `start` to `end`, both in [0, 1], lie among `length`. */
export function places(start, end, count, length) {
  const low = new Int32Array(count);
  const high = new Int32Array(count);
  const weight = new Float64Array(count);
  for (let i = 0; i < count; i++) {
    const wanted = (start + ((i + 0.5) / count) * (end - start)) * length - 0.5;
    const place = Math.min(Math.max(wanted, 0), length - 1);
    low[i] = Math.floor(place);
    high[i] = Math.min(low[i] + 1, length - 1);
    weight[i] = place - low[i];
  }
  return { low, high, weight };
}

/** Cuts the box [x0, y0, x1, y1], in [0, 1], out of a picture and resizes it: RGBA pixels. */
export function cropPicture(levels, [x0, y0, x1, y1], [height, width]) {
  const ratio = Math.max(((x1 - x0) * levels[0].width) / width,
    ((y1 - y0) * levels[0].height) / height);
  const level = Math.min(Math.max(Math.floor(Math.log2(ratio)), 0), levels.length - 1);
  const { pixels, height: rows, width: columns } = levels[level];
  const across = places(x0, x1, width, columns);
  const down = places(y0, y1, height, rows);
  const cut = new Uint8ClampedArray(4 * height * width);
  for (let y = 0, i = 0; y < height; y++) {
    const [upper, lower, v] = [down.low[y] * columns, down.high[y] * columns, down.weight[y]];
    for (let x = 0; x < width; x++, i += 4) {
      const [left, right, u] = [across.low[x], across.high[x], across.weight[x]];
      const [a, b] = [4 * (upper + left), 4 * (upper + right)];
      const [c, d] = [4 * (lower + left), 4 * (lower + right)];
      for (let k = 0; k < 3; k++) {
        const above = pixels[a + k] + u * (pixels[b + k] - pixels[a + k]);
        const under = pixels[c + k] + u * (pixels[d + k] - pixels[c + k]);
        cut[i + k] = Math.floor(above + v * (under - above) + 0.5);
      }
      cut[i + 3] = 255;
    }
  }
  return cut;
}

/**
 * Cuts the same box out of a map. The map is stored as the window [row, column, rows, columns] of
 * its grid outside of which it is zero; values are added to `target`, times `scale`.
 */
export function cropMap(map, window, [rows, columns], [x0, y0, x1, y1], [height, width], scale,
  target) {
  const [top, left, tall, wide] = window;
  const across = places(x0, x1, width, columns);
  const down = places(y0, y1, height, rows);
  const value = (row, column) =>
    row >= top && row < top + tall && column >= left && column < left + wide
      ? map[(row - top) * wide + column - left]
      : 0;
  for (let y = 0, i = 0; y < height; y++) {
    const [low, high, v] = [down.low[y], down.high[y], down.weight[y]];
    if (high < top || low >= top + tall) {
      i += width;
      continue;
    }
    for (let x = 0; x < width; x++, i++) {
      const [a, b, u] = [across.low[x], across.high[x], across.weight[x]];
      if (b < left || a >= left + wide) continue;
      const above = value(low, a) + u * (value(low, b) - value(low, a));
      const under = value(high, a) + u * (value(high, b) - value(high, a));
      target[i] += scale * (above + v * (under - above));
    }
  }
}

const WHOLE = [0, 0, 1, 1];

function percent(share) {
  return share > 0 && share < 0.01 ? "<1 %" : `${Math.round(share * 100)} %`;
}

/** A share in two digits, for a scale. */
function shareText(share) {
  return `${Number((share * 100).toPrecision(2))} %`;
}

function number(value) {
  const size = Math.abs(value);
  if (size >= 1000 || (size > 0 && size < 0.001)) return value.toExponential(1);
  return value.toPrecision(3);
}

/** What is known of the evidence: nodes and families of all classes, filled packet by packet. */
function makeStore(data) {
  const store = { nodes: new Map(), families: new Map(), sketches: new Map() };
  const merged = new Set();
  store.merge = async (packet) => {
    if (merged.has(packet.number)) return;
    merged.add(packet.number);
    const block = packet.maps.byteLength ? await inflate(packet.maps) : new Uint8Array(0);
    for (const node of packet.nodes) {
      const tight = node.tight ?? store.nodes.get(node.id)?.tight ?? null; // it is found later
      store.nodes.set(node.id, { ...node, tight });
    }
    let start = 0;
    for (const { key, children, explained, note } of packet.families) {
      for (const edge of children) {
        const area = edge.window[2] * edge.window[3];
        edge.map = block.subarray(start, start + area);
        start += area;
      }
      store.families.set(key, { children, explained, note });
    }
    for (const [id, picture] of packet.sketches ?? []) store.sketches.set(id, picture);
  };
  store.ready = () => Promise.all(data.packets.map(store.merge));
  return store;
}

/** Requests to the kernel, answered by id; a page without a kernel has none. */
function makeLine(model, data, store, heard, refuse) {
  const view = Math.random().toString(36).slice(2);
  const waiting = new Map();
  let asked = 0;
  const settle = (id, error) => {
    const request = waiting.get(id);
    if (!request) return; // stale: nobody waits for this answer any more
    waiting.delete(id);
    clearTimeout(request.timer);
    if (error) request.reject(new Error(error));
    else request.resolve();
  };
  const listen = async (content, buffers) => {
    if (content.packet?.picture === data.index) { // not one of the picture before
      const packet = { ...content.packet, maps: buffers[0] };
      packet.sketches = (packet.sketches ?? []).map((id, k) => [id, buffers[k + 1]]);
      if (!data.packets.some((known) => known.number === packet.number)) data.packets.push(packet);
      await store.merge(packet);
    }
    if (content.picture !== undefined) refuse(data.pictures[content.picture], content.error);
    settle(content.id, content.error);
    heard();
  };
  const live = typeof model.send === "function";
  if (live) model.on("msg:custom", listen);
  return {
    live,
    ask: (content) => new Promise((resolve, reject) => {
      const id = `${view}:${asked++}`;
      const timer = setTimeout(
        () => settle(id, "the kernel does not answer; run the cell again"), PATIENCE,
      );
      waiting.set(id, { resolve, reject, timer });
      model.send({ ...content, id });
    }),
    stop() {
      for (const { timer } of waiting.values()) clearTimeout(timer);
      waiting.clear();
      if (live) model.off("msg:custom", listen);
    },
  };
}

/** Builds the panel in `el`; returns what takes it away again. */
function build(model, el) {
  const data = model.get("_data");
  const palettes = Object.fromEntries(
    Object.entries(data.palettes).map(([name, view]) => [name, bytesOf(view)]),
  );
  const classes = new Map(data.classes.map((entry) => [entry.id, entry]));
  const stages = data.stages.map(({ stage }) => stage).sort((a, b) => b - a);
  const stageOf = new Map(data.stages.map((entry) => [entry.stage, entry]));
  const [imageHeight, imageWidth] = data.imageSize;
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const loading = new Set(); // keys of families that the kernel works on
  const missed = new Set(); // keys that it could not make
  let levels = null; // the picture and its halves, once decoded
  let frame = 0;
  let paintFrame = 0;
  let largest = 1; // the largest share that is visible
  let notice = null; // what the status line says until the next action
  let refused = null; // why another picture can't be shown, until the next action

  const redraw = () => (frame ||= requestAnimationFrame(draw));
  const values = settings(
    model,
    ["image_index", "class_ids", "class_id", "selected", "opened", "top", "last_stage", "cropped", "opacity", "palette"],
    redraw,
  );
  const store = makeStore(data);
  const line = makeLine(model, data, store, redraw, (name, error) => {
    refused = `The evidence of ${name} can't be made: ${error}`;
  });

  // ------------------------------------------------------------------------------- elements
  const className = ({ name, id }) => name ?? `class ${id}`;
  const classOptions = data.classes.map((entry) => [
    entry.id,
    entry.probability === null
      ? className(entry) : `${className(entry)} · ${percent(entry.probability)}`,
  ]);
  const classPicker = choice("Class", classOptions, (id) => showClasses(0, Number(id)));
  const picturePicker = choice("Picture", data.pictures.map((name, index) => [index, name]),
    (index) => {
      refused = null;
      values.set({ image_index: Number(index) });
      values.send();
    });
  const otherPicker = choice("Compare with", [["", "no other class"], ...classOptions],
    (id) => showClasses(1, id === "" ? null : Number(id)));
  const root = element("div", { class: "attnviz-panel attnviz-evidence" });
  const end = headEnd(root, {
    keys: KEYS, figure: makeFigure, name: () => fileName("evidence", values.get("selected")),
  });
  const head = element(
    "div", { class: "attnviz-head attnviz-tree-head" },
    element("span", { class: "attnviz-title" }, data.network || "Evidence"),
    data.pictures.length > 1 ? picturePicker.row : null,
    classPicker.row, data.classes.length > 1 ? otherPicker.row : null, end,
  );
  const top = slider("Top", { min: 1, max: data.most, step: 1, show: String,
    onset: (n) => values.set({ top: n }) });
  const deepest = choice("Down to",
    stages.map((stage) => [stage, `stage ${stage}`]),
    (stage) => values.set({ last_stage: Number(stage) }));
  const cropped = element("input", { type: "checkbox",
    onchange: () => values.set({ cropped: cropped.checked }) });
  const opacity = slider("Opacity", { min: 0, max: 1, step: 0.01, show: percent,
    onset: (x) => values.set({ opacity: x }) });
  const palette = choice("Colors", Object.keys(palettes).map((name) => [name, name]),
    (name) => values.set({ palette: name }));
  const tools = element(
    "div", { class: "attnviz-tools" }, top.row, deepest.row,
    element("label", { class: "attnviz-check" }, cropped, "Crop to receptive field"),
    opacity.row, palette.row,
  );
  const groves = [0, 1].map((side) => makeGrove(side));
  const status = element("div", { class: "attnviz-readout attnviz-told", "aria-live": "polite" });
  const edgeKeys = [0.1, 0.5, 1].map((part) => {
    const sample = element("i", { class: "attnviz-edge-key" });
    sample.style.height = `${edgeWidth(part, 1)}px`;
    const text = element("span", {});
    return { part, text, pair: element("span", { class: "attnviz-key-pair" }, sample, text) };
  });
  const legend = element(
    "div", { class: "attnviz-scale" },
    element("span", {}, "Edge: share of the parent"), ...edgeKeys.map(({ pair }) => pair),
    element("span", { class: "attnviz-key-pair" }, "Map 0",
      element("i", { class: "attnviz-ramp-key" }), "maximum"),
  );
  const detail = makeDetail();
  const problem = element("div", { class: "attnviz-error", role: "alert", hidden: true });
  const forest = element("div", { class: "attnviz-groves" }, ...groves.map(({ box }) => box));
  const body = element(
    "div", { class: "attnviz-tree-body" },
    element("div", { class: "attnviz-forest" }, forest, status, legend), detail.box,
  );
  root.append(problem, head, tools, body);
  root.classList.add("attnviz-loading");
  el.replaceChildren(root);
  root.addEventListener("change", values.send);
  const followClass = () => { // set by another panel
    const id = values.get("class_id");
    if (id === values.get("class_ids")[0]) return;
    if (classes.has(id)) showClasses(0, id);
    else say(`Class ${id} is not offered here.`);
  };
  model.on("change:class_id", followClass);

  // --------------------------------------------------------------------------------- actions
  function say(text) {
    notice = text;
    redraw();
  }

  function isOpened(link) {
    return values.get("opened").includes(link);
  }

  function setOpen(link, open) {
    const others = values.get("opened").filter((other) => other !== link);
    values.set({ opened: open ? [...others, link] : others });
  }

  function select(link) {
    notice = refused = null;
    if (values.get("selected") !== link) values.set({ selected: link });
    else redraw();
  }

  async function fetchFamily(record) {
    const key = record.key;
    if (store.families.has(key) || loading.has(key)) return store.families.has(key);
    if (!line.live) {
      say(`What ${shortName(record)} is made of was not exported; open it in a notebook and ` +
        "save the page again.");
      return false;
    }
    loading.add(key);
    redraw();
    try {
      const classId = parseLink(record.link).classId;
      await line.ask({ kind: "expand", class_id: classId, key });
      return true;
    } catch (error) {
      missed.add(key);
      say(`${shortName(record)} can't be opened: ${error.message}`);
      return false;
    } finally {
      loading.delete(key);
      redraw();
    }
  }

  async function open(record, grove) {
    if (record.leaf || isOpened(record.link)) return;
    if (!(await fetchFamily(record))) return;
    setOpen(record.link, true);
    grove.follow(record.link);
  }

  function toggle(record, grove) {
    if (record.leaf) say(`${shortName(record)} is at the last stage shown.`);
    else if (record.open) setOpen(record.link, false);
    else open(record, grove);
  }

  /** Opens the nodes of a link one after the other and selects its end. */
  async function goTo(text) {
    const wanted = parseLink(/^\d+:/.test(text.trim())
      ? `${values.get("class_ids")[0]}/${text.trim()}` : text);
    if (!wanted) return say(`“${text}” is no link; one looks like ${values.get("selected")}.`);
    if (!values.get("class_ids").includes(wanted.classId)) {
      if (!classes.has(wanted.classId)) return say(`Class ${wanted.classId} is not offered here.`);
      if (!(await showClasses(0, wanted.classId))) return undefined;
    }
    let [link, key, opened] = [String(wanted.classId), `class:${wanted.classId}`, []];
    for (const step of wanted.steps) {
      const node = store.nodes.get(key) ?? null;
      if (!(await fetchFamily({ link, key, node }))) return undefined;
      const { children } = store.families.get(key);
      const place = children.findIndex(({ id }) => id.startsWith(`${step}@`));
      if (place < 0) return say(`${step} is not among the channels behind ${link}.`);
      opened.push(link);
      if (place >= values.get("top")) values.set({ top: place + 1 });
      key = children[place].id;
      link += `/${step}`;
    }
    const last = Math.min(values.get("last_stage"), store.nodes.get(key)?.stage ?? Infinity);
    values.set({ opened: [...new Set([...values.get("opened"), ...opened])], last_stage: last });
    select(link);
    groves[values.get("class_ids").indexOf(wanted.classId)].follow(link);
    return undefined;
  }

  async function showClasses(side, id) {
    const ids = [...values.get("class_ids")];
    const key = `class:${id}`;
    if (id !== null && !store.families.has(key)) {
      if (!line.live) {
        say(`The evidence of ${className(classes.get(id))} was not exported.`);
        return false;
      }
      loading.add(key);
      redraw();
      try {
        await line.ask({ kind: "expand", class_id: id, key });
      } catch (error) {
        say(`${className(classes.get(id))} can't be shown: ${error.message}`);
        return false;
      } finally {
        loading.delete(key);
        redraw();
      }
    }
    if (id === null) ids.splice(side, 1);
    else ids[side] = id;
    const shown = [...new Set(ids)];
    const selected = values.get("selected");
    const kept = shown.includes(parseLink(selected).classId);
    values.set({
      class_ids: shown,
      class_id: shown[0],
      opened: [...new Set([...values.get("opened"), ...shown.map(String)])],
      selected: kept ? selected : String(id ?? shown[0]),
    });
    values.send();
    for (const grove of groves) grove.fit(...READABLE);
    return true;
  }

  function shortName({ node, link }) {
    return node ? `${node.stage}:${node.channel}`
      : className(classes.get(parseLink(link).classId));
  }

  // ---------------------------------------------------------------------------- drawing maps
  function fractions([x0, y0, x1, y1]) {
    return [x0 / imageWidth, y0 / imageHeight, x1 / imageWidth, y1 / imageHeight];
  }

  /** Draws the picture, or a box of it, with the maps of some edges over it. */
  function drawMaps(canvas, edges, box, [height, width]) {
    if (canvas.width !== width) canvas.width = width;
    if (canvas.height !== height) canvas.height = height;
    const image = new ImageData(width, height);
    const pixels = cropPicture(levels, box, [height, width]);
    if (edges.length) {
      const map = new Float32Array(height * width);
      for (const edge of edges) {
        const { size } = stageOf.get(store.nodes.get(edge.id).stage);
        cropMap(edge.map, edge.window, size, box, [height, width],
          edges.length > 1 ? edge.maximum / 255 : 1, map);
      }
      const peak = edges.length > 1 ? peakOf(map) : 255;
      overlay(pixels, map, peak, palettes[values.get("palette")], values.get("opacity"),
        image.data);
    } else image.data.set(pixels);
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  /** The size of a picture of a box that fits a square. */
  function fitted([x0, y0, x1, y1], side) {
    const [across, down] = [(x1 - x0) * imageWidth, (y1 - y0) * imageHeight];
    const factor = side / Math.max(across, down);
    return [Math.max(Math.round(down * factor), 1), Math.max(Math.round(across * factor), 1)];
  }

  function edgesOf({ edge, key }) {
    if (edge) return [edge];
    return (store.families.get(key)?.children ?? []).slice(0, values.get("top"));
  }

  function shownBox({ node }) {
    return node && values.get("cropped") ? fractions(node.field) : WHOLE;
  }

  /** The peak of a node in a box, both axes in [0, 1]. */
  function peakIn({ node }, [x0, y0, x1, y1]) {
    const { size: [rows, columns] } = stageOf.get(node.stage);
    const [row, column] = node.peak;
    return [((column + 0.5) / columns - x0) / (x1 - x0), ((row + 0.5) / rows - y0) / (y1 - y0)];
  }

  // ------------------------------------------------------------------------------- one tree
  function makeGrove(side) {
    const cards = new Map(); // link -> its element and what it shows
    const pending = new Set(); // cards whose picture is to be drawn
    const edges = element("svg", { "aria-hidden": "true", class: "attnviz-edges" });
    const items = element("div", { role: "tree", class: "attnviz-items" });
    const world = element("div", { class: "attnviz-world" }, edges, items);
    const heads = element("div", { class: "attnviz-headings", "aria-hidden": "true" });
    const ground = element("div", { class: "attnviz-ground" }, heads, world);
    const scroller = element("div", { class: "attnviz-scroller" }, ground);
    const zoomButton = (text, label, onclick) => element(
      "button", { type: "button", class: "attnviz-button", title: label, "aria-label": label,
        onclick }, text);
    const box = element(
      "section", { class: "attnviz-grove", hidden: true }, scroller,
      element("div", { class: "attnviz-zoom" },
        zoomButton("+", "Zoom in", () => zoomBy(1.25)),
        zoomButton("−", "Zoom out", () => zoomBy(0.8)),
        zoomButton("Fit", "Fit the whole tree", () => fit())),
    );
    let records = [];
    let byLink = new Map();
    let extent = { width: 1, height: 1 };
    let zoom = 1;
    let classId = null;
    let wantsFit = READABLE; // smallest and largest zoom of the fit that is due, or null
    let following = null; // a link to bring into view after the next layout
    let motion = 0;
    let hovered = null;
    const HEAD = 30;
    const EDGE = 18;
    const BOTTOM = 46; // below the tree, for the buttons

    const headings = ["Class", ...stages, "Input"].map((stage) => {
      const entry = stageOf.get(stage);
      const heading = element("span", { class: "attnviz-heading" },
        element("b", {}, entry ? `Stage ${stage}` : stage), entry ? ` ${entry.name}` : "");
      heads.append(heading);
      return heading;
    });

    function offset() {
      return {
        x: Math.max((scroller.clientWidth - extent.width * zoom) / 2, EDGE),
        y: Math.max((scroller.clientHeight - HEAD - extent.height * zoom + EDGE - BOTTOM) / 2, EDGE),
      };
    }

    function stretch() {
      const { x, y } = offset();
      ground.style.width = `${extent.width * zoom + 2 * x}px`;
      ground.style.height = `${extent.height * zoom + y + Math.max(y, BOTTOM) + HEAD}px`;
      world.style.transform = `translate(${x}px, ${y + HEAD}px) scale(${zoom})`;
      box.style.setProperty("--zoom", zoom);
      headings.forEach((heading, column) => {
        heading.style.left = `${x + columnPlace(column) * zoom}px`;
        heading.style.maxWidth = `${(columnPlace(column + 1) - columnPlace(column)) * zoom - 8}px`;
      });
    }

    function zoomTo(next, [across, down] = [scroller.clientWidth / 2, scroller.clientHeight / 2]) {
      const { x, y } = offset();
      const [worldX, worldY] = [
        (scroller.scrollLeft + across - x) / zoom, (scroller.scrollTop + down - HEAD - y) / zoom,
      ];
      zoom = Math.min(Math.max(next, ZOOM[0]), ZOOM[1]);
      stretch();
      const moved = offset();
      scroller.scrollLeft = worldX * zoom + moved.x - across;
      scroller.scrollTop = worldY * zoom + moved.y + HEAD - down;
    }

    function zoomBy(factor) {
      zoomTo(zoom * factor);
    }

    function fit(least = ZOOM[0], most = 1.25) {
      wantsFit = [least, most];
      redraw();
    }

    function fitNow(least, most) {
      const wanted = Math.min((scroller.clientWidth - 2 * EDGE) / extent.width,
        (scroller.clientHeight - HEAD - EDGE - BOTTOM) / extent.height);
      zoom = Math.min(Math.max(wanted, least), most);
      stretch();
    }

    /** How far to scroll so that a node, and its children where they fit, can be seen. */
    function scrollFor(link) {
      const record = byLink.get(link);
      const now = [scroller.scrollLeft, scroller.scrollTop];
      if (!record) return now;
      const { x, y } = offset();
      const shown = [record, ...record.children];
      const span = (places, size, shift, room, start, own) => {
        const low = Math.min(...places) * zoom + shift - EDGE;
        const high = (Math.max(...places) + size) * zoom + shift + EDGE;
        let next = start;
        if (high > next + room) next = high - room;
        if (low < next) next = low;
        const [first, last] = [own * zoom + shift - EDGE, (own + size) * zoom + shift + EDGE];
        if (last > next + room) next = last - room; // the node itself comes first
        if (first < next) next = first;
        return Math.max(next, 0);
      };
      return [
        span(shown.map((each) => each.x), record.width, x, scroller.clientWidth, now[0], record.x),
        span(shown.map((each) => each.y), CARD.height, y, scroller.clientHeight - HEAD, now[1],
          record.y),
      ];
    }

    function update(id, state, visible) {
      box.hidden = id === null;
      records = visible;
      if (id === null) return;
      items.setAttribute("aria-label",
        `Evidence of ${className(classes.get(id))}, a tree of channels`);
      if (classId !== id) {
        for (const card of cards.values()) card.item.remove();
        cards.clear();
        wantsFit ??= READABLE;
        classId = id;
      }
      const before = new Map([...cards].map(([link, card]) => [link, card.place]));
      byLink = new Map(records.map((record) => [record.link, record]));
      const old = extent;
      extent = placeNodes(records);
      for (const [link, card] of cards)
        if (!byLink.has(link)) {
          if (card.item === document.activeElement) following = focusNext(link);
          card.item.remove();
          cards.delete(link);
          pending.delete(card);
        }
      headings.forEach((heading, column) =>
        (heading.hidden = !records.some((record) =>
          record.column === column || (record.input && record.column + 1 === column))));
      for (const record of records) describe(record, state);
      [...records].forEach((record, k) => {
        const { item } = cards.get(record.link);
        if (items.children[k] !== item) items.insertBefore(item, items.children[k] ?? null);
      });
      stretch();
      if (wantsFit && scroller.clientWidth) {
        fitNow(...wantsFit);
        wantsFit = null;
      }
      move(before, old);
      paintQueue();
    }

    /** Takes the focus from a node that goes away to the nearest parent that stays. */
    function focusNext(link) {
      let rest = link;
      while (rest.includes("/") && !byLink.has(rest)) rest = rest.slice(0, rest.lastIndexOf("/"));
      setTimeout(() => cards.get(rest)?.item.focus({ preventScroll: true }));
      return rest;
    }

    function makeCard(record) {
      const canvas = element("canvas", { "aria-hidden": "true" });
      const dot = element("i", { class: "attnviz-peak-dot", "aria-hidden": "true" });
      const label = element("b", {});
      const share = element("span", { class: "attnviz-share" });
      const mark = element("span", { class: "attnviz-shared" });
      const door = element("span", { class: "attnviz-door", "aria-hidden": "true" });
      const thumb = element("span", { class: "attnviz-thumb" }, canvas, dot);
      const input = element("canvas", { class: "attnviz-input", "aria-hidden": "true" });
      const item = element(
        "div", { role: "treeitem", class: "attnviz-node", tabindex: "-1", id: newId() }, thumb,
        element("span", { class: "attnviz-text", "aria-hidden": "true" }, label, share, mark),
        door, input,
      );
      const card = { item, canvas, input, dot, label, share, mark, door, thumb, record, place: null };
      item.addEventListener("click", (event) => {
        if (panned) return;
        item.focus({ preventScroll: true });
        const now = card.record;
        const chosen = values.get("selected") === now.link;
        select(now.link);
        if (door.contains(event.target) || (chosen && now.open)) toggle(now, api);
        else if (!now.leaf && !now.open) open(now, api);
      });
      item.addEventListener("pointerenter", () => hover(card.record));
      item.addEventListener("pointerleave", () => hover(null));
      return card;
    }

    function describe(record, state) {
      let card = cards.get(record.link);
      if (!card) cards.set(record.link, (card = makeCard(record)));
      card.record = record;
      const { item } = card;
      const { node, edge, parent } = record;
      const entry = classes.get(id(record));
      const parents = state.parents.get(record.key)?.size ?? 1;
      const busy = loading.has(record.key);
      const missing = !record.leaf && !record.open && !line.live && !store.families.has(record.key);
      const known = store.families.get(record.key);
      const empty = known && known.children.length === 0;
      const set = (name, value) => {
        if (value === null) item.removeAttribute(name);
        else if (item.getAttribute(name) !== String(value)) item.setAttribute(name, value);
      };
      set("aria-level", record.depth + 1);
      set("aria-setsize", record.count);
      set("aria-posinset", record.index + 1);
      set("aria-selected", record.link === state.selected);
      set("aria-expanded", record.leaf || missing || empty ? null : record.open);
      set("aria-busy", busy || null);
      set("tabindex", record.link === state.tabStop[side] ? 0 : -1);
      set("data-link", record.link);
      const text = node
        ? `stage ${node.stage} channel ${node.channel}, ${percent(edge.share)} of ` +
          `${shortName(parent)}${parents > 1 ? `, shared by ${parents} parents` : ""}` +
          `${missing ? ", not exported further" : ""}`
        : `${className(entry)}, the decision`;
      set("aria-label", text);
      item.classList.toggle("attnviz-on-path", state.path.has(record.link));
      item.classList.toggle("attnviz-is-class", !node);
      card.label.textContent = node ? node.channel : className(entry);
      card.share.textContent = node ? percent(edge.share)
        : entry.probability === null ? number(entry.score) : percent(entry.probability);
      card.mark.textContent = parents > 1 ? "shared" : "";
      card.mark.title = `evidence of ${parents} parents`;
      card.mark.hidden = parents < 2;
      card.door.hidden = record.leaf;
      card.door.className = `attnviz-door${busy ? " attnviz-busy" : ""}` +
        `${missing || empty ? " attnviz-shut" : ""}`;
      card.door.textContent = busy ? "" : missing || empty ? "·" : record.open ? "−" : "+";
      card.door.title = missing ? "not exported" : empty ? "no positive evidence"
        : record.open ? "close" : "open";
      const box = shownBox(record);
      const look = [state.look, box.join(), node ? "" : `${state.top} ${Boolean(known)}`].join(" ");
      card.input.hidden = !record.input;
      if (card.look !== look || card.edge !== edge) {
        card.look = look;
        card.edge = edge;
        card.box = box;
        pending.add(card);
        card.dot.hidden = !node;
        if (node) {
          const [across, down] = peakIn(record, box);
          card.dot.style.left = `${across * 100}%`;
          card.dot.style.top = `${down * 100}%`;
        }
      }
    }

    function id({ link }) {
      return parseLink(link).classId;
    }

    function paint(until) {
      if (!levels) return;
      for (const card of pending) {
        pending.delete(card);
        const size = fitted(card.box, THUMB * SHARP);
        drawMaps(card.canvas, edgesOf(card.record), card.box, size);
        card.thumb.style.width = `${size[1] / SHARP}px`;
        card.thumb.style.height = `${size[0] / SHARP}px`;
        if (!card.input.hidden) {
          const field = fractions(card.record.node.field);
          drawMaps(card.input, [], field, fitted(field, THUMB * SHARP));
        }
        if (performance.now() > until) return;
      }
    }

    function drawEdges(places) {
      const lines = [];
      for (const record of records) {
        if (!record.parent) continue;
        const [from, to] = [places.get(record.parent.link), places.get(record.link)];
        lines.push([record, edgeCurve(from, to)]);
      }
      for (const record of records)
        if (record.input) {
          const from = places.get(record.link);
          lines.push([record, edgeCurve(from, { x: from.x + from.width + GAP, y: from.y }), true]);
        }
      // the path to the decision lies above the others
      lines.sort(([a], [b]) => onPath(a) - onPath(b));
      while (edges.children.length > lines.length) edges.lastChild.remove();
      while (edges.children.length < lines.length) edges.append(element("path"));
      lines.forEach(([record, curve, sees], k) => {
        const path = edges.children[k];
        path.setAttribute("d", curve);
        path.setAttribute("stroke-width", sees ? 1.5 : edgeWidth(record.edge.share, largest));
        path.setAttribute("class", `attnviz-edge${onPath(record) ? " attnviz-on-path" : ""}` +
          `${sees ? " attnviz-sees" : ""}`);
      });
    }

    function onPath({ link }) {
      return Number(pathLinks().has(link));
    }

    /** Moves the cards from where they were to where they belong, and the view with them. */
    function move(before, old) {
      cancelAnimationFrame(motion);
      const link = following;
      following = null;
      const origin = (record) => {
        for (let each = record; each; each = each.parent)
          if (before.get(each.link)) return before.get(each.link);
        return { x: record.x, y: record.y };
      };
      const starts = new Map(records.map((record) => [record.link, origin(record)]));
      const scrolls = [scroller.scrollLeft, scroller.scrollTop];
      const targets = link ? scrollFor(link) : scrolls;
      const same = records.every((record) => {
        const start = before.get(record.link);
        return start && start.x === record.x && start.y === record.y;
      });
      const time = same && targets[0] === scrolls[0] && targets[1] === scrolls[1]
        || still.matches || before.size === 0 ? 0 : 180;
      if (!same && time && old) {
        edges.style.width = `${Math.max(extent.width, old.width)}px`;
        edges.style.height = `${Math.max(extent.height, old.height)}px`;
      }
      const begun = performance.now();
      const step = (now) => {
        const t = time ? Math.min(Math.max((now - begun) / time, 0), 1) : 1;
        const eased = 1 - (1 - t) ** 3;
        const places = new Map();
        for (const record of records) {
          const start = starts.get(record.link);
          const place = {
            x: start.x + eased * (record.x - start.x), y: start.y + eased * (record.y - start.y),
            width: record.width,
          };
          places.set(record.link, place);
          const card = cards.get(record.link);
          card.place = place;
          card.item.style.transform = `translate(${place.x}px, ${place.y}px)`;
        }
        drawEdges(places);
        if (link) {
          scroller.scrollLeft = scrolls[0] + eased * (targets[0] - scrolls[0]);
          scroller.scrollTop = scrolls[1] + eased * (targets[1] - scrolls[1]);
        }
        if (t < 1) motion = requestAnimationFrame(step);
        else {
          edges.style.width = `${extent.width}px`;
          edges.style.height = `${extent.height}px`;
        }
      };
      step(begun);
    }

    function hover(record) {
      if (hovered?.link === record?.link) return;
      hovered = record;
      for (const other of groves) other.twins(record?.key ?? null);
      showStatus(record);
    }

    function twins(key) {
      for (const { item, record } of cards.values())
        item.classList.toggle("attnviz-twin", key !== null && record.key === key);
    }

    // ------------------------------------------------------------------------ moving about
    let drag = null;
    let panned = false;
    scroller.addEventListener("pointerdown", (event) => {
      panned = false;
      if (event.button !== 0 || event.pointerType === "touch") return;
      const area = scroller.getBoundingClientRect();
      const bars = event.clientX - area.left > scroller.clientWidth
        || event.clientY - area.top > scroller.clientHeight;
      if (bars) return;
      drag = { x: event.clientX, y: event.clientY, left: scroller.scrollLeft,
        top: scroller.scrollTop, id: event.pointerId };
    });
    scroller.addEventListener("pointermove", (event) => {
      if (!drag) return;
      if (!event.buttons) return drop(); // it was let go outside
      const [across, down] = [event.clientX - drag.x, event.clientY - drag.y];
      if (!panned && Math.hypot(across, down) < 5) return;
      if (!panned) {
        panned = true;
        cancelAnimationFrame(motion);
        finish();
        scroller.setPointerCapture(drag.id);
        scroller.classList.add("attnviz-panning");
      }
      scroller.scrollLeft = drag.left - across;
      scroller.scrollTop = drag.top - down;
    });
    function drop() {
      drag = null;
      setTimeout(() => (panned = false)); // after the click that ends a drag
      scroller.classList.remove("attnviz-panning");
    }
    scroller.addEventListener("pointerup", drop);
    scroller.addEventListener("pointercancel", drop);
    scroller.addEventListener("lostpointercapture", drop);
    scroller.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const area = scroller.getBoundingClientRect();
      zoomTo(zoom * Math.exp(-event.deltaY / 300),
        [event.clientX - area.left, event.clientY - area.top]);
    }, { passive: false });
    const watcher = new ResizeObserver(() => stretch());
    watcher.observe(scroller);

    /** Ends a motion at once. */
    function finish() {
      for (const record of records) {
        const card = cards.get(record.link);
        card.place = { x: record.x, y: record.y };
        card.item.style.transform = `translate(${record.x}px, ${record.y}px)`;
      }
      drawEdges(new Map(records.map((record) => [record.link, record])));
    }

    function go(record) {
      if (!record) return;
      select(record.link);
      following = record.link;
      cards.get(record.link).item.focus({ preventScroll: true });
    }

    items.addEventListener("keydown", (event) => {
      const record = byLink.get(event.target.dataset.link);
      if (!record || event.ctrlKey || event.metaKey || event.altKey) return;
      const column = records.filter((other) => other.column === record.column);
      const place = column.indexOf(record);
      const actions = {
        ArrowUp: () => go(column[place - 1]),
        ArrowDown: () => go(column[place + 1]),
        ArrowLeft: () => go(record.parent),
        ArrowRight: () => (record.children.length ? go(record.children[0]) : openByKey(record)),
        Home: () => go(records[0]),
        End: () => go(column.at(-1)),
        Enter: () => toggle(record, api),
        " ": () => toggle(record, api),
        "*": () => column.forEach((other) => open(other, api)),
        "+": () => zoomBy(1.25),
        "=": () => zoomBy(1.25),
        "-": () => zoomBy(0.8),
        0: () => fit(),
        c: () => values.set({ cropped: !values.get("cropped") }),
      };
      const action = actions[event.key] ?? actions[event.key.toLowerCase()];
      if (!action) return;
      event.preventDefault();
      event.stopPropagation();
      notice = null;
      action();
    });

    function openByKey(record) {
      if (record.leaf || record.open) toggle({ ...record, leaf: true }, api);
      else open(record, api);
    }

    /** The whole tree of the class, its upper left corner at (left, top). */
    function figure(left, top) {
      paint(Infinity);
      const inColumn = (column) => records.some((record) => record.column === column);
      const names = stages.filter((_, k) => inColumn(k + 1)).map((stage) => figureText(
        `Stage ${stage}`, left + columnPlace(1 + stages.indexOf(stage)), top + 12,
        { size: 12, weight: 600, fill: "#59606a" },
      ));
      const lines = [...edges.children].map((path) => {
        const on = path.classList.contains("attnviz-on-path");
        const sees = path.classList.contains("attnviz-sees");
        return element("path", {
          d: path.getAttribute("d"), fill: "none", stroke: on ? ACCENT : "#b9c0ca",
          "stroke-width": path.getAttribute("stroke-width"),
          "stroke-dasharray": sees ? "1 5" : null, "stroke-linecap": sees ? "round" : null,
        });
      });
      const nodes = records.map((record) => {
        const { canvas, input, label, share, dot, box: shownPart } = cards.get(record.link);
        const { x, y, width, node, input: sees } = record;
        const on = onPath(record);
        const text = node ? 58 : 98;
        const at = ([across, down], place) => [place[0] + across * place[2], place[1] + down * place[3]];
        const size = [canvas.width / SHARP, canvas.height / SHARP];
        const place = [x + 2 + (width - 4 - text - size[0]) / 2, y + (CARD.height - size[1]) / 2, ...size];
        const peak = node && !dot.hidden ? at(peakIn(record, shownPart), place) : null;
        const inputPlace = [x + CARD.width + GAP, y + (CARD.height - input.height / SHARP) / 2,
          input.width / SHARP, input.height / SHARP];
        const words = figureLines(label.textContent, x + width - text + 7, y + (node ? 13 : 8),
          text - 14, { size: node ? 13 : 12, weight: 600 });
        if (words.nodes.length > 2) words.nodes[1].textContent += " …";
        return [
          element("rect", { x, y, width, height: CARD.height, rx: 8, fill: "#fff",
            stroke: on ? ACCENT : "#d8dce2" }),
          figureImage([canvas], ...place),
          peak ? element("circle", { cx: peak[0], cy: peak[1], r: 3, fill: "#00b8d4",
            stroke: "#fff", "stroke-width": 1.5 }) : [],
          words.nodes.slice(0, 2),
          figureText(share.textContent, x + width - text + 7,
            y + (node ? 41 : 17 + Math.min(words.height, 34)), { size: 12, fill: "#59606a" }),
          sees ? figureImage([input], ...inputPlace) : [],
        ];
      });
      return {
        width: extent.width, height: extent.height + 24,
        parts: [names, element("g", { transform: `translate(${left} ${top + 24})` },
          ...lines, ...nodes.flat(Infinity))],
      };
    }

    const api = {
      box, update, fit, twins, paint, figure,
      get waits() {
        return pending.size > 0;
      },
      follow(link) {
        following = link;
        redraw();
      },
      stop() {
        cancelAnimationFrame(motion);
        watcher.disconnect();
      },
    };
    return api;
  }

  function makeFigure() {
    if (!levels) throw new Error("nothing is drawn yet");
    const gap = 16;
    let [width, y] = [0, gap];
    const parts = [];
    values.get("class_ids").forEach((_, k) => {
      const tree = groves[k].figure(gap, y);
      parts.push(tree.parts);
      width = Math.max(width, tree.width);
      y += tree.height + gap;
    });
    return figureOf(width + 2 * gap, y, parts);
  }

  function paintQueue() {
    if (paintFrame || !levels || !groves.some(({ waits }) => waits)) return;
    paintFrame = requestAnimationFrame(() => {
      paintFrame = 0;
      const until = performance.now() + 8;
      for (const grove of groves) grove.paint(until);
      paintQueue();
    });
  }

  // ------------------------------------------------------------------------- what is selected
  function makeDetail() {
    const title = element("div", { class: "attnviz-detail-title" });
    const trail = element("nav", { class: "attnviz-trail", "aria-label": "Path to the decision" });
    const canvas = element("canvas", { role: "img", class: "attnviz-map" });
    const marks = element("svg", { "aria-hidden": "true" });
    const picture = element("div", { class: "attnviz-picture" }, canvas, marks);
    const cropCanvas = element("canvas", { role: "img" });
    const sketchCanvas = element("canvas", { role: "img" });
    const sketchNote = element("span", { class: "attnviz-blank" });
    const mark = (name, text) => element("span", { class: "attnviz-mark" },
      element("i", { class: `${name}-mark` }), text);
    const fieldMark = mark("attnviz-field", "its field");
    const parentMark = mark("attnviz-parent", "parent's field");
    const tightMark = mark("attnviz-tight", "used part");
    const marksKey = element("div", { class: "attnviz-marks" }, fieldMark, parentMark, tightMark);
    const crop = (shown, text, ...more) => element("figure", { class: "attnviz-crop" },
      element("div", { class: "attnviz-crop-frame" }, shown, ...more),
      element("figcaption", {}, text));
    const crops = element("div", { class: "attnviz-crops" },
      crop(cropCanvas, "Receptive field"), crop(sketchCanvas, "Guided backprop", sketchNote));
    const facts = element("dl", { class: "attnviz-facts" });
    const bars = element("div", { class: "attnviz-histogram" });
    const link = element("input", { type: "text", class: "attnviz-link", spellcheck: "false",
      autocomplete: "off", "aria-label": "Link of the selection; type one and press Enter" });
    const copy = element("button", { type: "button", class: "attnviz-button",
      onclick: () => copyLink() }, "Copy link");
    link.addEventListener("keydown", (event) => {
      if (event.key === "Enter") goTo(link.value);
      if (event.key === "Escape") link.value = values.get("selected");
    });
    link.addEventListener("focus", () => link.select());
    const box = element(
      "aside", { class: "attnviz-detail", "aria-label": "The selected channel" },
      title, trail, picture, marksKey, crops, facts, bars,
      element("div", { class: "attnviz-link-row" }, link, copy),
    );
    let shown = "";
    let asked = null;
    let timer = null;
    let sketched = null; // the node whose sketch is on the canvas

    async function copyLink() {
      try {
        await navigator.clipboard.writeText(values.get("selected"));
        say("The link is copied.");
      } catch {
        link.focus();
        say("The link is selected: copy it with Ctrl C.");
      }
    }

    function update(record, state) {
      if (document.activeElement !== link) link.value = record.link;
      const known = store.families.get(record.key);
      const key = [record.link, state.look, state.top, Boolean(known), Boolean(levels),
        record.node?.tight].join(" ");
      sketch(record);
      if (key === shown) return;
      shown = key;
      const { node, edge } = record;
      const entry = classes.get(parseLink(record.link).classId);
      title.textContent = node
        ? `Channel ${node.channel}` : className(entry);
      const steps = [];
      for (let each = record; each; each = each.parent) steps.unshift(each);
      trail.replaceChildren(...steps.flatMap((each, k) => [
        k ? element("span", { "aria-hidden": "true" }, "›") : "",
        element("button", { type: "button", class: "attnviz-step",
          "aria-current": each === record ? "true" : null,
          onclick: () => {
            select(each.link);
            groves[state.class_ids.indexOf(entry.id)].follow(each.link);
          } }, shortName(each)),
      ]).filter(Boolean));
      drawFacts(record, entry, known, steps);
      drawHistogram(node);
      crops.hidden = marksKey.hidden = !node;
      parentMark.hidden = !record.parent?.node;
      tightMark.hidden = !node?.tight;
      if (!levels) return;
      const edges = edgesOf(record);
      drawMaps(canvas, edges, WHOLE, [data.height, data.width]);
      picture.style.setProperty("--ratio", data.width / data.height);
      canvas.setAttribute("aria-label", node
        ? `Attention map of stage ${node.stage} channel ${node.channel} for ` +
          `${shortName(record.parent)}, over the picture`
        : `Sum of the maps of the top ${edges.length} channels for ${className(entry)}`);
      drawMarks(record);
      if (!node) return;
      const field = fractions(node.field);
      drawMaps(cropCanvas, [], field, fitted(field, 140 * SHARP));
      cropCanvas.setAttribute("aria-label",
        `The picture in the receptive field of channel ${node.channel}`);
    }

    function drawMarks({ node, parent }) {
      marks.setAttribute("viewBox", `0 0 ${imageWidth} ${imageHeight}`);
      const outline = ([x0, y0, x1, y1], name) => ["attnviz-halo", name].map((part) =>
        element("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0, class: part }));
      if (!node) return marks.replaceChildren();
      const { size: [rows, columns] } = stageOf.get(node.stage);
      const [x, y] = [((node.peak[1] + 0.5) / columns) * imageWidth,
        ((node.peak[0] + 0.5) / rows) * imageHeight];
      marks.replaceChildren(
        ...(parent.node ? outline(parent.node.field, "attnviz-parent-field") : []),
        ...outline(node.field, "attnviz-found"),
        ...(node.tight ? outline(node.tight, "attnviz-tight") : []),
        ...["attnviz-peak-halo", "attnviz-peak"].map((name) =>
          element("path", { d: `M${x} ${y}h0`, class: name })),
      );
      return undefined;
    }

    function drawFacts({ node, edge, parent }, entry, known, steps) {
      const through = steps.slice(1).reduce((product, each) => product * each.edge.share, 1);
      const rows = node
        ? [
          ["Stage", `${node.stage}, ${stageOf.get(node.stage).name}`],
          ["Activation at the peak", number(node.activation)],
          [`Contribution α to ${shortName(parent)}`, number(edge.contribution)],
          [`Share of ${shortName(parent)}`, percent(edge.share)],
          ...(steps.length > 2 ? [["Share along the path", shareText(through)]] : []),
          ["Peak, receptive field",
            `(${node.peak.join(", ")}), ${node.field[2] - node.field[0]} × ` +
            `${node.field[3] - node.field[1]} px`],
        ]
        : [
          ["Score", number(entry.score)],
          ...(entry.probability === null ? [] : [["Probability", percent(entry.probability)]]),
        ];
      if (known) {
        if (known.explained !== null)
          rows.push(["Explained by all channels", percent(known.explained)]);
        const top = known.children.slice(0, values.get("top"));
        rows.push([top.length === 1 ? "Top channel" : `Top ${top.length} channels together`,
          percent(top.reduce((sum, child) => sum + child.share, 0))]);
      }
      if (known?.note) rows.push(["Evidence", known.note]);
      facts.replaceChildren(...rows.map(([name, value]) => element("div", {},
        element("dt", {}, name), element("dd", {}, value))));
    }

    function drawHistogram(node) {
      const histogram = node && data.histograms[`${node.stage}:${node.channel}`];
      bars.hidden = !histogram;
      if (!histogram) return;
      const most = Math.max(...histogram.map(([, value]) => value), 1e-9);
      bars.replaceChildren(element("div", { class: "attnviz-histogram-title" }, "Classes whose top evidence it is"),
        ...histogram.map(([name, value]) => {
          const bar = element("span", { class: "attnviz-bar" }, element("i"));
          const row = element("div", { class: "attnviz-histogram-row" },
            element("span", { class: "attnviz-name", title: name }, name), bar,
            element("span", { class: "attnviz-number" }, number(value)));
          row.style.setProperty("--share", value / most);
          return row;
        }));
    }

    /** Shows the guided gradient of a node; the kernel is asked when the selection rests. */
    function sketch({ node, link: path }) {
      const id = node?.id ?? null;
      if (id === sketched) return;
      const known = store.sketches.get(id);
      if (known) {
        sketched = id;
        sketchNote.textContent = "";
        sketchCanvas.hidden = false;
        sketchCanvas.setAttribute("aria-label",
          `Guided gradient of channel ${node.channel} in its receptive field`);
        createImageBitmap(new Blob([known])).then((bitmap) => {
          if (sketched !== id) return;
          [sketchCanvas.width, sketchCanvas.height] = [bitmap.width, bitmap.height];
          sketchCanvas.getContext("2d").drawImage(bitmap, 0, 0);
          bitmap.close();
        }).catch(() => (sketchNote.textContent = "can't be decoded"));
        return;
      }
      sketchCanvas.hidden = true;
      if (id === null || id === asked) return;
      asked = id;
      clearTimeout(timer);
      if (!line.live) {
        sketchNote.textContent = "not exported";
        return;
      }
      sketchNote.textContent = "…";
      timer = setTimeout(() => {
        line.ask({ kind: "sketch", class_id: parseLink(path).classId, key: id })
          .catch((error) => asked === id && (sketchNote.textContent = error.message));
      }, 250);
    }

    return { box, update, stop: () => clearTimeout(timer) };
  }

  function showStatus(record) {
    if (!record) {
      status.textContent = notice ?? (line.live
        ? "Click a channel to see it and what it is made of; drag to move."
        : "Click a channel to see it; drag to move.");
      return;
    }
    const { node, edge, parent } = record;
    if (!node) {
      const entry = classes.get(parseLink(record.link).classId);
      status.replaceChildren(element("strong", {}, className(entry)),
        element("span", {}, `score ${number(entry.score)}`));
      return;
    }
    status.replaceChildren(
      element("strong", {}, `Stage ${node.stage} channel ${node.channel}`),
      element("span", {}, `${percent(edge.share)} of ${shortName(parent)}`),
      element("span", {}, `α ${number(edge.contribution)}`),
      element("span", {}, `activation ${number(node.activation)}`),
    );
  }

  // --------------------------------------------------------------------------------- a frame
  function pathLinks() {
    const parts = values.get("selected").split("/");
    return new Set(parts.map((_, k) => parts.slice(0, k + 1).join("/")));
  }

  function draw() {
    frame = 0;
    try {
      report(refused);
      update();
    } catch (error) {
      fail(error);
    }
  }

  function fail(error) {
    root.classList.remove("attnviz-loading");
    report(`The panel can't be drawn: ${error.message ?? error}`);
  }

  function report(text) {
    problem.hidden = !text;
    if (problem.textContent !== text) problem.textContent = text;
  }

  /** The record of the selection, or of its nearest parent that is visible. */
  function chosen(records, link) {
    let rest = link;
    for (;;) {
      const found = records.find((record) => record.link === rest);
      if (found || !rest.includes("/")) return found ?? records[0];
      rest = rest.slice(0, rest.lastIndexOf("/"));
    }
  }

  function update() {
    const ids = values.get("class_ids");
    const state = {
      class_ids: ids,
      opened: new Set(values.get("opened")),
      top: values.get("top"),
      last_stage: values.get("last_stage"),
      look: [values.get("palette"), values.get("opacity"), values.get("cropped")].join(" "),
      path: pathLinks(),
    };
    const trees = ids.map((id) =>
      visibleNodes(store.families, store.nodes, id, state.opened, state, stages));
    state.parents = new Map(); // of each node, those that are visible
    for (const { key, parent } of trees.flat())
      if (parent) state.parents.set(key, (state.parents.get(key) ?? new Set()).add(parent.key));
    largest = Math.max(...trees.flat().map(({ edge }) => edge?.share ?? 0), 1e-9);
    for (const { part, text } of edgeKeys) text.textContent = shareText(part * largest);
    const side = Math.max(ids.indexOf(parseLink(values.get("selected")).classId), 0);
    const record = chosen(trees[side], values.get("selected"));
    state.selected = record.link;
    state.tabStop = ids.map((id, k) => (k === side ? record.link : String(id)));
    if (line.live) // what the kernel opened before this view was there to hear of it
      for (const each of trees.flat())
        if (!each.leaf && !each.open && state.opened.has(each.link) && !missed.has(each.key))
          fetchFamily(each);
    const index = values.get("image_index");
    picturePicker.update(index);
    root.classList.toggle("attnviz-loading", !levels || (line.live && index !== data.index));
    if (!line.live && index !== data.index)
      notice = `The evidence of ${data.pictures[index] ?? "that picture"} was not exported.`;
    classPicker.update(ids[0]);
    otherPicker.update(ids[1] ?? "");
    if (!line.live)
      for (const option of root.querySelectorAll(".attnviz-tree-head option"))
        option.disabled = picturePicker.list.contains(option)
          ? Number(option.value) !== data.index
          : option.value !== "" && !store.families.has(`class:${option.value}`);
    top.update(state.top);
    deepest.update(state.last_stage);
    cropped.checked = values.get("cropped");
    opacity.update(values.get("opacity"));
    palette.update(values.get("palette"));
    root.style.setProperty("--ramp", rampOf(palettes[values.get("palette")]));
    root.classList.toggle("attnviz-two", ids.length > 1);
    root.setAttribute("aria-busy", String(loading.size > 0));
    groves.forEach((grove, k) => grove.update(ids[k] ?? null, state, trees[k] ?? []));
    detail.update(record, state);
    showStatus(null);
    paintQueue();
    remember();
  }

  // a saved page keeps the selection in its address, so that the address is a link to it
  function remember() {
    const link = `#${values.get("selected")}`;
    if (model.alone && location.protocol !== "about:" && location.hash !== link)
      history.replaceState(null, "", link);
  }

  const asked = !model.alone ? "" : decodeURIComponent(location.hash.slice(1));
  Promise.all([
    store.ready(),
    decode(data.image, data.mime, [data.height, data.width]).then((pixels) => {
      levels = pyramid(pixels, [data.height, data.width]);
    }).catch(() => {
      throw new Error("the picture can't be decoded");
    }),
  ]).then(() => (parseLink(asked) ? goTo(asked) : redraw())).catch(fail);
  return () => {
    cancelAnimationFrame(frame);
    cancelAnimationFrame(paintFrame);
    for (const grove of groves) grove.stop();
    detail.stop();
    line.stop();
    model.off("change:class_id", followClass);
    values.stop();
  };
}

let ids = 0;

function newId() {
  return `attnviz-node-${Math.random().toString(36).slice(2, 8)}-${ids++}`;
}

/** Builds the panel, and again when the kernel shows another picture. */
function mount(model, el) {
  let stop = build(model, el);
  const again = () => {
    stop();
    stop = build(model, el);
  };
  model.on("change:_data", again);
  return () => {
    model.off("change:_data", again);
    stop();
  };
}

export default drawnBy(mount);

// What all panels share: the mathematics of maps and pictures, small DOM helpers, and the link
// between controls and the widget's model. Joined in front of a panel's own file.

/** Where the pixels of a resized row lie in the old row; pixel centers aligned. */
export function bilinear(from, to) {
  const low = new Int32Array(to);
  const high = new Int32Array(to);
  const weight = new Float32Array(to);
  for (let i = 0; i < to; i++) {
    const place = Math.max(((i + 0.5) * from) / to - 0.5, 0);
    low[i] = Math.min(Math.floor(place), from - 1);
    high[i] = Math.min(low[i] + 1, from - 1);
    weight[i] = place - low[i];
  }
  return { low, high, weight };
}

/** Resizes a map to width x height and keeps the larger value in `target`. */
export function resizeMax(map, [rows, columns], target, [height, width]) {
  const { low, high, weight: share } = bilinear(columns, width);
  const down = bilinear(rows, height);
  const stretched = new Map(); // the last two rows, stretched to the new width
  const stretch = (row) => {
    let line = stretched.get(row);
    if (line) return line;
    for (const old of stretched.keys()) if (old < row - 1) stretched.delete(old);
    line = new Float32Array(width);
    const start = row * columns;
    for (let x = 0; x < width; x++) {
      const left = map[start + low[x]];
      line[x] = left + share[x] * (map[start + high[x]] - left);
    }
    stretched.set(row, line);
    return line;
  };
  for (let y = 0, i = 0; y < height; y++) {
    const upper = stretch(down.low[y]);
    const lower = stretch(down.high[y]);
    const weight = down.weight[y];
    for (let x = 0; x < width; x++, i++) {
      const value = upper[x] + weight * (lower[x] - upper[x]);
      if (value > target[i]) target[i] = value;
    }
  }
}

/** The value of a map at a point, both axes in [0, 1]. */
export function sample(map, [rows, columns], across, down) {
  const x = Math.min(Math.max(across * columns - 0.5, 0), columns - 1);
  const y = Math.min(Math.max(down * rows - 0.5, 0), rows - 1);
  const [x0, y0] = [Math.floor(x), Math.floor(y)];
  const [x1, y1] = [Math.min(x0 + 1, columns - 1), Math.min(y0 + 1, rows - 1)];
  const upper = map[y0 * columns + x0] * (1 - x + x0) + map[y0 * columns + x1] * (x - x0);
  const lower = map[y1 * columns + x0] * (1 - x + x0) + map[y1 * columns + x1] * (x - x0);
  return upper * (1 - y + y0) + lower * (y - y0);
}

/** The scaling function of Eq. 3.9 at the 256 levels of a normalized map. */
export function scaleLevels(scaling, gamma) {
  const functions = {
    none: (x) => x,
    tanh: (x) => Math.tanh(gamma * x),
    sqrt: Math.sqrt,
    tan: Math.tan,
  };
  return Float32Array.from({ length: 256 }, (_, level) => functions[scaling](level / 255));
}

/** The largest value of a map, at least 0. */
export function peakOf(map) {
  let peak = 0;
  for (let i = 0; i < map.length; i++) if (map[i] > peak) peak = map[i];
  return peak;
}

/**
 * The half-open box [x0, y0, x1, y1] of the largest 8-connected component of map > threshold *
 * peak, by number of pixels, or null. Runs of a row are joined with touching runs of the row
 * above.
 */
export function componentBox(map, [height, width], threshold, peak) {
  const limit = Math.fround(Math.fround(threshold) * peak); // single precision, as in Python
  const parent = [];
  const starts = [];
  const ends = [];
  const rows = [];
  const root = (run) => {
    while (parent[run] !== run) run = parent[run] = parent[parent[run]];
    return run;
  };
  let above = 0; // first run of the row above that may still touch
  let row = 0; // first run of this row
  for (let y = 0; y < height; y++) {
    const last = row;
    row = parent.length;
    above = last;
    for (let x = 0, i = y * width; x < width; x++, i++) {
      if (!(map[i] > limit)) continue;
      const start = x;
      while (x < width && map[i] > limit) x++, i++;
      const run = parent.length;
      parent.push(run);
      starts.push(start);
      ends.push(x);
      rows.push(y);
      while (above < row && ends[above] < start) above++;
      for (let other = above; other < row && starts[other] <= x; other++) {
        const [a, b] = [root(other), root(run)];
        parent[Math.max(a, b)] = Math.min(a, b);
      }
    }
  }
  const found = new Map();
  let best = null;
  for (let run = 0; run < parent.length; run++) {
    const label = root(run);
    let box = found.get(label);
    if (!box) found.set(label, (box = { x0: width, y0: rows[run], x1: 0, y1: 0, count: 0 }));
    box.x0 = Math.min(box.x0, starts[run]);
    box.x1 = Math.max(box.x1, ends[run]);
    box.y1 = rows[run] + 1;
    box.count += ends[run] - starts[run];
  }
  for (const box of found.values()) if (!best || box.count > best.count) best = box;
  return best && [best.x0, best.y0, best.x1, best.y1];
}

/** Intersection over union of two half-open boxes. */
export function iou(a, b) {
  const across = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const down = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  const shared = Math.max(across, 0) * Math.max(down, 0);
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return shared / (area(a) + area(b) - shared);
}

/** Lays a map over RGBA pixels; the map's largest value has the last color. */
export function overlay(pixels, map, peak, colors, opacity, target) {
  const keep = new Float64Array(256);
  const color = new Float64Array(768);
  for (let level = 0; level < 256; level++) {
    const weight = opacity * Math.sqrt(level / 255);
    keep[level] = 1 - weight;
    for (let c = 0; c < 3; c++) color[3 * level + c] = weight * colors[3 * level + c] + 0.5;
  }
  const factor = peak > 0 ? 255 / peak : 0;
  const words = new Uint32Array(target.buffer, target.byteOffset, map.length); // RGBA at once
  for (let i = 0, p = 0; i < map.length; i++, p += 4) {
    const level = (map[i] * factor + 0.5) | 0;
    const kept = keep[level];
    const at = 3 * level;
    words[i] = (kept * pixels[p] + color[at]) | ((kept * pixels[p + 1] + color[at + 1]) << 8) |
      ((kept * pixels[p + 2] + color[at + 2]) << 16) | 0xff000000;
  }
}

/** The bytes of a trait. */
export function bytesOf(view) {
  return new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

/** The bytes that zlib had compressed. */
export async function inflate(view) {
  const stream = new Blob([view]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The RGBA pixels of an encoded picture. */
export async function decode(view, mime, [height, width]) {
  const blob = new Blob([view], { type: mime });
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return context.getImageData(0, 0, width, height).data;
}

/** Makes an element; attributes that begin with "on" are listeners, null ones are left out. */
export function element(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "path", "circle", "text", "image"].includes(name);
  const made = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  if (["input", "select", "button"].includes(name) || "tabindex" in attributes)
    made.setAttribute("data-lm-suppress-shortcuts", "true"); // keys stay in the panel
  made.append(...children.filter((child) => child !== null));
  return made;
}

let count = 0;

/** A row of a control, its label and what else belongs to it. */
function labelled(label, kind, control, ...others) {
  control.id = `attnviz-${Math.random().toString(36).slice(2)}-${count++}`;
  return element(
    "div", { class: kind }, element("label", { for: control.id }, label), control, ...others,
  );
}

/** A labelled slider; `show` writes the value beside it. */
export function slider(label, { min, max, step, show, onset }) {
  const output = element("span", { class: "attnviz-value", "aria-hidden": "true" });
  const input = element("input", { type: "range", min, max, step });
  input.addEventListener("input", () => onset(Number(input.value)));
  const row = labelled(label, "attnviz-slider", input, output);
  const update = (value, disabled = false) => {
    if (Number(input.value) !== value) input.value = value;
    output.textContent = show(value);
    input.setAttribute("aria-valuetext", show(value));
    input.disabled = disabled;
    row.classList.toggle("attnviz-off", disabled);
  };
  return { row, input, update };
}

/** A labelled list to choose one entry from; options are [value, text] pairs. */
export function choice(label, options, onset) {
  const list = element("select");
  const fill = (entries) =>
    list.replaceChildren(...entries.map(([value, text]) => element("option", { value }, text)));
  fill(options);
  list.addEventListener("change", () => onset(list.value));
  const row = labelled(label, "attnviz-choice", list);
  const update = (value) => {
    if (list.value !== String(value)) list.value = value;
  };
  return { row, list, fill, update };
}

/**
 * The settings of a panel: read from the model, set at once, sent to the kernel when they rest.
 * What was set here and not sent yet wins over what comes back from the kernel.
 */
export function settings(model, names, redraw) {
  const pending = new Map();
  let timer = null;
  const send = () => {
    clearTimeout(timer);
    timer = null;
    if (!pending.size) return;
    pending.clear();
    model.save_changes();
  };
  const heard = names.map((name) => {
    const listener = () => {
      if (pending.has(name) && model.get(name) !== pending.get(name))
        model.set(name, pending.get(name));
      redraw();
    };
    model.on(`change:${name}`, listener);
    return [`change:${name}`, listener];
  });
  return {
    get: (name) => model.get(name),
    set(values, rest = true) { // without rest, what plays by itself, it is sent by `send` only
      for (const [name, value] of Object.entries(values)) pending.set(name, value);
      for (const [name, value] of Object.entries(values)) model.set(name, value);
      if (!rest) return;
      clearTimeout(timer);
      timer = setTimeout(send, 150);
    },
    send,
    stop() {
      send();
      for (const [event, listener] of heard) model.off(event, listener);
    },
  };
}

/** A color table as the background of a slider or a legend. */
export function rampOf(table) {
  const stops = Array.from({ length: 17 }, (_, k) => {
    const at = 3 * Math.round((k * 255) / 16);
    return `rgb(${table[at]} ${table[at + 1]} ${table[at + 2]})`;
  });
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

// ----------------------------------------------------------------------- figures for a paper

const SHARPNESS = 2; // pixels of a saved picture for one of the page
export const FIGURE_FONT = "system-ui, 'DejaVu Sans', sans-serif";

/** Text in a figure. */
export function figureText(text, x, y, { size = 13, weight = null, fill = "#1f2328", anchor = null } = {}) {
  const node = element("text", {
    x, y, fill, "font-size": size, "font-weight": weight, "text-anchor": anchor,
  });
  node.textContent = text;
  return node;
}

/** Text in a figure, in as many lines as the width takes; returns them and their height. */
export function figureLines(text, x, y, width, look = {}) {
  const size = look.size ?? 13;
  const pen = element("canvas").getContext("2d");
  pen.font = `${look.weight ?? 400} ${size}px ${FIGURE_FONT}`;
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (lines.at(-1) && pen.measureText(longer).width > width) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  const step = Math.round(size * 1.4);
  const nodes = lines.map((line, k) => figureText(line, x, y + size + k * step, look));
  return { nodes, height: lines.length * step };
}

/** What is on a canvas, or on several one over the other, as a part of a figure. */
export function figureImage(canvases, x, y, width, height) {
  const [first] = canvases;
  const joined = element("canvas");
  [joined.width, joined.height] = [first.width, first.height];
  const context = joined.getContext("2d");
  for (const canvas of canvases) context.drawImage(canvas, 0, 0, first.width, first.height);
  return element("image", {
    href: joined.toDataURL("image/png"), x, y, width, height, preserveAspectRatio: "none",
  });
}

/** A box or a path of a panel's picture as a part of a figure: a dark halo, then the line. */
export function figureLine(shape, color, { width = 2, dash = null } = {}) {
  return [["#000", width + 1.6, 0.55, null], [color, width, 1, dash]].map(
    ([stroke, thick, opacity, dashes]) => {
      const node = shape.cloneNode();
      for (const name of ["class", "style"]) node.removeAttribute(name);
      const look = { fill: "none", stroke, "stroke-width": thick, "stroke-opacity": opacity,
        "stroke-dasharray": dashes, "vector-effect": "non-scaling-stroke" };
      for (const [name, value] of Object.entries(look))
        if (value !== null) node.setAttribute(name, value);
      return node;
    });
}

/** A figure on white, of parts that are placed in its pixels. */
export function figureOf(width, height, ...parts) {
  return element(
    "svg",
    { width, height, viewBox: `0 0 ${width} ${height}`, "font-family": FIGURE_FONT },
    element("rect", { width, height, fill: "#fff" }), ...parts.flat(Infinity),
  );
}

async function toPng(svg) {
  const image = new Image();
  image.src = URL.createObjectURL(toFile(svg));
  try {
    await image.decode();
  } finally {
    URL.revokeObjectURL(image.src);
  }
  const canvas = element("canvas");
  canvas.width = Math.round(svg.getAttribute("width") * SHARPNESS);
  canvas.height = Math.round(svg.getAttribute("height") * SHARPNESS);
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function toFile(svg) {
  return new Blob([new XMLSerializer().serializeToString(svg)], { type: "image/svg+xml" });
}

function saveFile(blob, name) {
  const address = URL.createObjectURL(blob);
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/**
 * The end of a panel's header: what copies or saves the view as a figure, and the keys.
 * `figure` makes an SVG element of the view and `name` a file name without its ending.
 */
export function headEnd(root, { keys, figure, name, before = [] }) {
  const said = element("p", { class: "attnviz-said", role: "status" });
  const act = (text, work, done) => element(
    "button",
    { type: "button", class: "attnviz-button", onclick: async () => {
      try {
        await work();
        said.textContent = done;
      } catch (error) {
        said.textContent = `Not done: ${error.message}`;
      }
    } },
    text,
  );
  const copy = async () => {
    if (!navigator.clipboard?.write) throw new Error("this page may not copy; save it instead");
    const item = new ClipboardItem({ "image/png": toPng(figure()) });
    await navigator.clipboard.write([item]).catch(() => {
      throw new Error("the browser refuses to copy; save it instead");
    });
  };
  const menu = element(
    "div", { class: "attnviz-popup attnviz-menu", hidden: true, role: "group",
      "aria-label": "What is on screen as a figure" },
    element("div", { class: "attnviz-menu-row" },
      act("Copy PNG", copy, "Copied."),
      act("Save PNG", async () => saveFile(await toPng(figure()), `${name()}.png`), "Saved as PNG."),
      act("Save SVG", () => saveFile(toFile(figure()), `${name()}.svg`), "Saved as SVG.")),
    said,
  );
  const list = element("dl", { class: "attnviz-popup attnviz-keys", hidden: true }, ...keys.map(
    ([key, text]) => element("div", {}, element("dt", {}, key), element("dd", {}, text))));
  const opener = (popup, text, label) => {
    const button = element("button", { type: "button", class: "attnviz-button", title: label,
      "aria-label": label, "aria-expanded": "false", onclick: () => toggle(popup) }, text);
    return button;
  };
  const popups = new Map([
    [menu, opener(menu, "Figure", "Copy or save as a figure")], [list, opener(list, "?", "Keys")],
  ]);
  function toggle(popup, open = popup.hidden) {
    for (const [other, button] of popups) {
      other.hidden = other !== popup || !open;
      button.setAttribute("aria-expanded", String(!other.hidden));
    }
    said.textContent = "";
  }
  root.addEventListener("pointerdown", (event) => {
    const inside = [...popups].flat().some((part) => part.contains(event.target));
    if (!inside) toggle(null, false);
  });
  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input[type=text]");
    if (event.key === "?" && !typing) toggle(list);
    else if (event.key === "Escape" && [...popups.keys()].some(({ hidden }) => !hidden)) {
      const [, button] = [...popups].find(([popup]) => !popup.hidden);
      toggle(null, false);
      button.focus();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return element(
    "span", { class: "attnviz-end" }, ...before, ...popups.values(), ...popups.keys(),
  );
}

/** A file name for what is on screen. */
export function fileName(...parts) {
  return parts.join(" ").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "")
    .slice(0, 80) || "figure";
}

/** What a panel's module gives to the notebook or the page; what fails is said in the panel. */
export function drawnBy(build) {
  return {
    render({ model, el }) {
      try {
        return build(model, el);
      } catch (error) {
        const problem = { class: "attnviz-panel attnviz-error", role: "alert" };
        el.replaceChildren(
          element("div", problem, `The panel can't be drawn: ${error.message}`),
        );
        return undefined;
      }
    },
  };
}

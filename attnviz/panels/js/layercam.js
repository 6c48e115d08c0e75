// The LayerCAM panel. Joined behind core.js, whose functions it uses.

const METHODS = {
  layercam: "LayerCAM",
  gradcam: "Grad-CAM",
  gradcam_pp: "Grad-CAM++",
  layercam_normal: "LayerCAM, all gradients",
  normgrad: "NormGrad",
  cam: "CAM",
  scorecam: "Score-CAM",
  excitation_backprop: "Excitation backprop",
};
const SCALINGS = [["tanh", "tanh(γx)"], ["none", "x"], ["sqrt", "√x"], ["tan", "tan x"]];
const SCALED = [["shallow", "all but deepest"], ["all", "all"], ["none", "none"]];
const KEYS = [
  ["1 2 3 …", "add or drop a stage"], ["P", "next picture"], ["C", "next class"],
  ["M", "next method"], ["O", "original beside"],
  ["← → ↑ ↓", "on the picture: move the point; Shift: 16 pixels"],
  ["Tab", "next control; arrows change it"], ["?", "these keys"],
];
const FOUND = "#00e5ff";
const THUMB = 112;

/** Whether a stage is scaled before fusion: Eq. 3.9 leaves the deepest one selected as it is. */
export function isScaled(stage, stages, scaled) {
  return scaled === "all" || (scaled === "shallow" && stage < Math.max(...stages));
}

/**
 * The maps by method, stage and class: a class is stored as its difference from the one before,
 * modulo 256. Changes `bytes` in place; returns stacks[class][method][stage].
 */
export function unpack(bytes, count, methods, sizes) {
  const stacks = Array.from({ length: count }, () =>
    Object.fromEntries(methods.map((name) => [name, []])));
  let start = 0;
  for (const name of methods)
    for (const [rows, columns] of sizes) {
      const area = rows * columns;
      for (let k = 0; k < count; k++, start += area) {
        const map = bytes.subarray(start, start + area);
        if (k) for (let i = 0; i < area; i++) map[i] += bytes[start - area + i];
        stacks[k][name].push(map);
      }
    }
  return stacks;
}

/** The fused map: levels scaled, resized, joined by the largest value. */
export function fuse(stack, sizes, stages, { scaling, gamma, scaled }, size) {
  const fused = new Float32Array(size[0] * size[1]);
  const [plain, bent] = [scaleLevels("none", 1), scaleLevels(scaling, gamma)];
  for (const stage of stages) {
    const values = isScaled(stage, stages, scaled) ? bent : plain;
    const levels = stack[stage - 1];
    const map = new Float32Array(levels.length); // Float32Array.from takes ten times as long
    for (let i = 0; i < map.length; i++) map[i] = values[levels[i]];
    resizeMax(map, sizes[stage - 1], fused, size);
  }
  return fused;
}

function percent(value) {
  return `${Math.round(value * 100)} %`;
}

function scoreText(score) {
  return Math.abs(score) >= 100 ? score.toFixed(0) : score.toPrecision(3);
}

/** Builds the panel in `el`; returns what takes it away again. */
function build(model, el) {
  const data = model.get("_data");
  const pictures = data.pictures;
  const palettes = Object.fromEntries(
    Object.entries(data.palettes).map(([name, view]) => [name, bytesOf(view)]),
  );
  const depth = data.stageNames.length;
  const ready = new Map(); // picture number -> its pixels and maps, once decoded
  const listed = new Map();
  let shown = null; // what the last frame drew
  let frame = 0;
  let probe = null; // the pointer, in [0, 1] across and down

  const redraw = () => (frame ||= requestAnimationFrame(draw));
  const values = settings(
    model,
    ["image_index", "class_id", "method", "stages", "gamma", "scaling", "scaled", "opacity",
      "palette", "threshold"],
    redraw,
  );

  // ------------------------------------------------------------------------------- elements
  const canvas = element("canvas", { role: "img", class: "attnviz-map" });
  const original = element("canvas", { role: "img", "aria-label": "the picture alone" });
  const boxes = element("svg", { "aria-hidden": "true", preserveAspectRatio: "xMidYMid meet" });
  const boxesBeside = boxes.cloneNode();
  const main = element(
    "div", { class: "attnviz-picture", tabindex: "0", role: "group",
      "aria-label": "Picture; arrow keys move the point whose values are shown" },
    canvas, boxes,
  );
  const beside = element("div", { class: "attnviz-picture" }, original, boxesBeside);
  const readout = element("div", { class: "attnviz-readout" });
  const verdict = element("div", { class: "attnviz-readout attnviz-verdict" });
  const threshold = slider("Threshold", {
    min: 0, max: 0.99, step: 0.01, show: percent, onset: (x) => values.set({ threshold: x }),
  });
  threshold.row.classList.add("attnviz-ramp");
  const figure = element(
    "div", { class: "attnviz-figure" },
    element("div", { class: "attnviz-pictures" }, beside, main), threshold.row, verdict, readout,
  );

  const picturePicker = choice(
    "Picture", pictures.map(({ name }, index) => [index, name]),
    (index) => choosePicture(Number(index)),
  );
  const methodPicker = choice(
    "Method", data.methods.map((name) => [name, METHODS[name] ?? name]),
    (method) => values.set({ method }),
  );
  const pair = element("input", { type: "checkbox" });
  pair.addEventListener("change", () => {
    figure.classList.toggle("attnviz-pair", pair.checked);
    redraw();
  });
  const root = element("div", { class: "attnviz-panel" });
  const end = headEnd(root, {
    keys: KEYS, figure: makeFigure,
    name: () => fileName(values.get("method"), shown?.entry.name ?? "", shown?.picture.name ?? ""),
  });
  const head = element(
    "div", { class: "attnviz-head" },
    element("span", { class: "attnviz-title" }, data.network || "LayerCAM"),
    pictures.length > 1 ? picturePicker.row : null,
    methodPicker.row,
    element("label", { class: "attnviz-check" }, pair, "Original beside"), end,
  );

  const group = Math.random().toString(36).slice(2);
  const classList = element("div", { class: "attnviz-classes" });
  const stageTiles = data.stageNames.map((name, k) => {
    const tile = element("canvas", { "aria-hidden": "true" });
    const value = element("span", { class: "attnviz-number" });
    const button = element(
      "button",
      { type: "button", class: "attnviz-stage", title: `stage ${k + 1}: ${name}; the number is its map under the pointer`,
        onclick: () => toggle(k + 1) },
      tile, element("span", { class: "attnviz-caption" },
        element("span", {}, element("span", { class: "attnviz-word" }, "Stage "), `${k + 1}`), value),
    );
    return { button, tile, value };
  });
  const gamma = slider("γ", {
    min: 0.5, max: 8, step: 0.1, show: (x) => x.toFixed(1), onset: (x) => values.set({ gamma: x }),
  });
  const scaling = choice("Function", SCALINGS, (x) => values.set({ scaling: x }));
  const scaled = choice("Stages", SCALED, (x) => values.set({ scaled: x }));
  const opacity = slider("Opacity", {
    min: 0, max: 1, step: 0.01, show: percent, onset: (x) => values.set({ opacity: x }),
  });
  const palette = choice(
    "Colors", Object.keys(palettes).map((name) => [name, name]), (x) => values.set({ palette: x }),
  );
  const section = (title, ...rows) =>
    element("fieldset", {}, element("legend", {}, title), ...rows);
  const controls = element(
    "div", { class: "attnviz-controls" },
    section("Class and score", classList),
    section("Stages to fuse",
      element("div", { class: "attnviz-stages" }, ...stageTiles.map(({ button }) => button))),
    section("Scaling before fusion",
      element("div", { class: "attnviz-row" }, gamma.row),
      element("div", { class: "attnviz-row" }, scaling.row, scaled.row)),
    section("Overlay", element("div", { class: "attnviz-row" }, opacity.row, palette.row)),
  );
  const problem = element("div", { class: "attnviz-error", role: "alert", hidden: true });
  root.append(problem, head, element("div", { class: "attnviz-body" }, figure, controls));
  // room for the tallest picture and the longest list, so that nothing moves later
  root.style.setProperty(
    "--ratio", Math.min(...pictures.map(({ width, height }) => width / height)),
  );
  root.style.setProperty("--rows", Math.max(...pictures.map(({ classes }) => classes.length)));
  el.replaceChildren(root);
  root.addEventListener("change", values.send); // a control was let go
  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const nextOf = (list, value) => list[(list.indexOf(value) + 1) % list.length];
    const index = values.get("image_index");
    const acts = {
      p: () => choosePicture((index + 1) % pictures.length),
      c: () => values.set({ class_id:
        nextOf(pictures[index].classes.map(({ id }) => id), classOf(pictures[index]).id) }),
      m: () => values.set({ method: nextOf(data.methods, values.get("method")) }),
      o: () => pair.click(),
    };
    const stage = Number(event.key);
    const act = acts[event.key.toLowerCase()]
      ?? (stage >= 1 && stage <= depth ? () => toggle(stage) : null);
    if (!act) return;
    event.preventDefault();
    act();
  });

  // ------------------------------------------------------------------------------- behaviour
  function fail(error) {
    shown = null;
    root.classList.remove("attnviz-loading");
    canvas.width = original.width = 0; // not the picture before
    canvas.setAttribute("aria-label", "nothing drawn");
    for (const part of [boxes, boxesBeside, verdict, readout]) part.replaceChildren();
    problem.hidden = false;
    problem.textContent = `The panel can't be drawn: ${error.message ?? error}`;
  }

  function classOf(picture) {
    const wanted = values.get("class_id");
    return picture.classes.find(({ id }) => id === wanted) ?? picture.classes[0];
  }

  function choosePicture(index) {
    const known = pictures[index].classes.some(({ id }) => id === values.get("class_id"));
    values.set({
      image_index: index,
      class_id: known ? values.get("class_id") : pictures[index].classes[0].id,
    });
  }

  function toggle(stage) {
    const stages = values.get("stages");
    const next = stages.includes(stage)
      ? stages.filter((other) => other !== stage)
      : [...stages, stage].sort((a, b) => a - b);
    values.set({ stages: next });
    values.send();
  }

  async function load(index) {
    const picture = pictures[index];
    const size = [picture.height, picture.width];
    const [pixels, maps] = await Promise.all([
      decode(picture.image, picture.mime, size).catch(() => {
        throw new Error(`the picture ${picture.name} can't be decoded`);
      }),
      inflate(picture.maps).catch(() => {
        throw new Error(`the maps of ${picture.name} can't be decoded`);
      }),
    ]);
    const stacks = unpack(maps, picture.classes.length, data.methods, picture.sizes);
    const small = [Math.round((THUMB * picture.height) / picture.width), THUMB];
    ready.set(index, {
      size,
      pixels,
      image: new ImageData(picture.width, picture.height),
      stack: (entry, method) => stacks[picture.classes.indexOf(entry)][method],
      small,
      smallPixels: shrink(pixels, size, small),
    });
    redraw();
  }

  function draw() {
    frame = 0;
    try {
      problem.hidden = true;
      paint();
    } catch (error) {
      fail(error);
    }
  }

  function paint() {
    const index = values.get("image_index");
    const picture = pictures[index];
    if (!ready.has(index)) {
      ready.set(index, null);
      load(index).catch((error) => {
        ready.set(index, { error });
        redraw();
      });
    }
    const loaded = ready.get(index);
    root.classList.toggle("attnviz-loading", !loaded);
    if (loaded?.error) throw loaded.error;
    const entry = classOf(picture);
    updateControls(index, picture, entry);
    if (!loaded) return;
    const state = Object.fromEntries(
      ["method", "stages", "gamma", "scaling", "scaled", "opacity", "palette", "threshold"].map(
        (name) => [name, values.get(name)],
      ),
    );
    const fusion = JSON.stringify([index, entry.id, state.method, state.stages, state.gamma,
      state.scaling, state.scaled]);
    const isNew = fusion !== shown?.fusion;
    const stack = isNew ? loaded.stack(entry, state.method) : shown.stack;
    const fused = isNew
      ? fuse(stack, picture.sizes, state.stages, state, loaded.size)
      : shown.fused;
    const peak = isNew ? peakOf(fused) : shown.peak;
    const box = isNew || state.threshold !== shown.state.threshold
      ? componentBox(fused, loaded.size, state.threshold, peak)
      : shown.box;
    const look = `${state.palette} ${state.opacity}`;
    if (isNew || look !== shown.look) {
      overlay(loaded.pixels, fused, peak, palettes[state.palette], state.opacity,
        loaded.image.data);
      show(canvas, loaded.image);
      drawTiles(picture, loaded, stack, state);
    }
    if (index !== shown?.index)
      show(original, new ImageData(loaded.pixels, picture.width, picture.height));
    shown = { index, picture, loaded, state, fusion, look, stack, fused, peak, box, entry };
    drawBoxes(picture, box);
    drawProbe();
  }

  function show(surface, image) {
    if (surface.width !== image.width) surface.width = image.width;
    if (surface.height !== image.height) surface.height = image.height;
    surface.getContext("2d").putImageData(image, 0, 0);
  }

  function drawTiles(picture, loaded, stack, state) {
    const [height, width] = loaded.small;
    stageTiles.forEach(({ tile }, k) => {
      const stage = k + 1;
      const inUse = state.stages.includes(stage) ? state.stages : [...state.stages, stage];
      const map = fuse(stack, picture.sizes, [stage], {
        ...state,
        scaled: isScaled(stage, inUse, state.scaled) ? "all" : "none",
      }, loaded.small);
      const image = new ImageData(width, height);
      overlay(loaded.smallPixels, map, peakOf(map), palettes[state.palette], state.opacity,
        image.data);
      show(tile, image);
    });
  }

  function updateControls(index, picture, entry) {
    picturePicker.update(index);
    methodPicker.update(values.get("method"));
    const bent = values.get("scaled") !== "none";
    gamma.update(values.get("gamma"), !bent || values.get("scaling") !== "tanh");
    scaling.update(values.get("scaling"));
    scaled.update(values.get("scaled"));
    threshold.update(values.get("threshold"));
    opacity.update(values.get("opacity"));
    palette.update(values.get("palette"));
    paintRamp(values.get("palette"));
    const stages = values.get("stages");
    stageTiles.forEach(({ button }, k) =>
      button.setAttribute("aria-pressed", String(stages.includes(k + 1))));
    if (listed.get("index") !== index) {
      listed.set("index", index);
      listClasses(picture);
    }
    for (const input of classList.querySelectorAll("input"))
      input.checked = Number(input.value) === entry.id;
  }

  function listClasses(picture) {
    const scores = picture.classes.map(({ score }) => score);
    const [low, high] = [Math.min(0, ...scores), Math.max(...scores)];
    classList.replaceChildren(...picture.classes.map(({ id, name, score }) => {
      const row = element(
        "label", { class: "attnviz-class", title: `${name} (class ${id})` },
        element("input", {
          type: "radio", name: `class-${group}`, value: id,
          onchange: () => values.set({ class_id: id }),
        }),
        element("span", { class: "attnviz-name" }, name),
        element("span", { class: "attnviz-bar", "aria-hidden": "true" }, element("i")),
        element("span", { class: "attnviz-number" }, scoreText(score)),
      );
      const share = high > low ? (score - low) / (high - low) : 0;
      row.style.setProperty("--share", share);
      return row;
    }));
  }

  function paintRamp(name) {
    if (listed.get("palette") === name) return;
    listed.set("palette", name);
    root.style.setProperty("--ramp", rampOf(palettes[name]));
  }

  function drawBoxes(picture, box) {
    const across = picture.fullWidth / picture.width;
    const down = picture.fullHeight / picture.height;
    const found = box && [box[0] * across, box[1] * down, box[2] * across, box[3] * down];
    const outline = ([x0, y0, x1, y1], name) => ["attnviz-halo", name].map((part) =>
      element("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0,
        class: part === name ? name : `${part} ${name}-halo` }));
    for (const layer of [boxes, boxesBeside]) {
      layer.setAttribute("viewBox", `0 0 ${picture.fullWidth} ${picture.fullHeight}`);
      layer.replaceChildren(
        ...picture.boxes.flatMap((truth) => outline(truth, "attnviz-truth")),
        ...(found ? outline(found, "attnviz-found") : []),
      );
    }
    const rounded = found && found.map((value) => Math.floor(value + 0.5));
    const best = found && picture.boxes.length
      ? Math.max(...picture.boxes.map((truth) => iou(found, truth)))
      : null;
    const key = (name, text) =>
      element("span", { class: "attnviz-key" }, element("i", { class: `${name}-key` }), text);
    const text = rounded
      ? `box ${rounded[0]}, ${rounded[1]} – ${rounded[2]}, ${rounded[3]}`
      : "no box";
    verdict.replaceChildren(
      key("attnviz-found", text),
      picture.boxes.length ? key("attnviz-truth", "ground truth") : "",
      best === null ? "" : element("strong", {}, `IoU ${best.toFixed(2)}`),
    );
    const stages = values.get("stages");
    describe(`${METHODS[values.get("method")] ?? values.get("method")} of ${shown.entry.name}, ` +
      `${stages.length ? `stages ${stages.join(", ")}` : "no stage"}; ${text}` +
      (best === null ? "" : `; IoU ${best.toFixed(2)}`));
  }

  function describe(text) {
    if (canvas.getAttribute("aria-label") !== text) canvas.setAttribute("aria-label", text);
  }

  // ----------------------------------------------------------------- the view for a paper
  function makeFigure() {
    if (!shown) throw new Error("nothing is drawn yet");
    const { picture, state, entry, box } = shown;
    const [side, gap] = [448, 12];
    const fit = side / Math.max(picture.width, picture.height);
    const [width, height] = [picture.width * fit, picture.height * fit];
    const across = width / picture.fullWidth;
    const down = height / picture.fullHeight;
    const rect = ([x0, y0, x1, y1], x) => element("rect", {
      x: x + x0 * across, y: gap + y0 * down, width: (x1 - x0) * across, height: (y1 - y0) * down,
    });
    const found = box && box.map((value, k) =>
      value * (k % 2 ? picture.fullHeight / picture.height : picture.fullWidth / picture.width));
    const shownCanvases = pair.checked ? [original, canvas] : [canvas];
    const wide = gap + shownCanvases.length * (width + gap);
    const parts = shownCanvases.flatMap((each, k) => {
      const x = gap + k * (width + gap);
      return [
        figureImage([each], x, gap, width, height),
        picture.boxes.map((truth) => figureLine(rect(truth, x), "#fff", { dash: "7 5" })),
        found ? figureLine(rect(found, x), FOUND) : [],
      ];
    });
    const scaling = SCALINGS.find(([name]) => name === state.scaling)[1]
      .replace("γ", `${state.gamma.toFixed(1)} `);
    const bent = state.stages.some((stage) => isScaled(stage, state.stages, state.scaled));
    const words = `${METHODS[state.method] ?? state.method} of ${entry.name}, ` +
      (state.stages.length > 1 ? "stages " : "stage ") + (state.stages.join(", ") || "none") +
      (bent ? `, ${scaling}` : "");
    let y = height + 2 * gap;
    const caption = figureLines(words, gap, y, wide - 2 * gap, { weight: 600 });
    y += caption.height;
    const said = figureLines([...verdict.children].map(({ textContent }) => textContent).join(", "), gap, y, wide - 2 * gap);
    y += said.height + gap / 2;
    const scale = element("canvas");
    [scale.width, scale.height] = [256, 1];
    const row = new ImageData(256, 1);
    const table = palettes[state.palette];
    for (let i = 0; i < 1024; i++)
      row.data[i] = i % 4 === 3 ? 255 : table[3 * (i >> 2) + (i % 4)];
    scale.getContext("2d").putImageData(row, 0, 0);
    const mark = gap + state.threshold * (wide - 2 * gap);
    return figureOf(wide, y + 34, parts, caption.nodes, said.nodes,
      figureImage([scale], gap, y, wide - 2 * gap, 10),
      figureLine(element("path", { d: `M${mark} ${y - 2}v14` }), "#fff"),
      figureText("0", gap, y + 25, { size: 11 }),
      figureText("maximum of the map", wide - gap, y + 25, { size: 11, anchor: "end" }));
  }

  // ------------------------------------------------------------- the values under the pointer
  function drawProbe() {
    if (!shown) return;
    const { picture, loaded, stack, fused, peak } = shown;
    for (const layer of [boxes, boxesBeside]) layer.querySelector(".attnviz-probe")?.remove();
    if (!probe) {
      readout.textContent = values.get("stages").length
        ? "Point at the picture to read its values."
        : "No stage is selected.";
      for (const { value } of stageTiles) value.textContent = "";
      return;
    }
    const [x, y] = [
      Math.min(Math.floor(probe[0] * picture.width), picture.width - 1),
      Math.min(Math.floor(probe[1] * picture.height), picture.height - 1),
    ];
    const value = peak > 0 ? fused[y * picture.width + x] / peak : 0;
    const [px, py] = [
      Math.min(Math.floor(probe[0] * picture.fullWidth), picture.fullWidth - 1),
      Math.min(Math.floor(probe[1] * picture.fullHeight), picture.fullHeight - 1),
    ];
    readout.replaceChildren(
      element("span", {}, `x ${px}, y ${py}`),
      element("strong", {}, `fused ${value.toFixed(2)}`),
      element("span", { class: "attnviz-dim" }, "of its maximum"),
    );
    stageTiles.forEach((tile, k) => {
      const [across, down] = [(x + 0.5) / picture.width, (y + 0.5) / picture.height];
      const level = sample(stack[k], picture.sizes[k], across, down) / 255;
      tile.value.textContent = level.toFixed(2);
    });
    const cross = `M${px + 0.5} ${py + 0.5}h0`;
    for (const layer of probe.byKey ? [boxes, boxesBeside] : [boxesBeside])
      layer.append(element("path", { d: cross, class: "attnviz-probe" }));
  }

  function pointAt(event) {
    const { picture } = shown ?? {};
    if (!picture) return;
    const area = event.currentTarget.getBoundingClientRect();
    const fit = Math.min(area.width / picture.width, area.height / picture.height);
    const [width, height] = [picture.width * fit, picture.height * fit];
    const across = (event.clientX - area.left - (area.width - width) / 2) / width;
    const down = (event.clientY - area.top - (area.height - height) / 2) / height;
    const inside = across >= 0 && across < 1 && down >= 0 && down < 1;
    probe = inside ? [across, down] : null;
    drawProbe();
  }
  for (const part of [main, beside]) {
    part.addEventListener("pointermove", pointAt);
    part.addEventListener("pointerleave", () => {
      probe = null;
      drawProbe();
    });
  }
  main.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    if (!move || !shown) return;
    event.preventDefault();
    const { width, height } = shown.picture;
    const step = event.shiftKey ? 16 : 1;
    const [x, y] = probe
      ? [Math.floor(probe[0] * width) + move[0] * step, Math.floor(probe[1] * height) + move[1] * step]
      : [Math.floor(width / 2), Math.floor(height / 2)];
    const clip = (value, limit) => (Math.min(Math.max(value, 0), limit - 1) + 0.5) / limit;
    probe = [clip(x, width), clip(y, height)];
    probe.byKey = true;
    readout.setAttribute("aria-live", "polite");
    drawProbe();
  });
  main.addEventListener("blur", () => {
    readout.removeAttribute("aria-live");
    probe = null;
    drawProbe();
  });

  redraw();
  return () => {
    cancelAnimationFrame(frame);
    values.stop();
  };
}

/** Shrinks RGBA pixels by averaging the pixels that fall together. */
export function shrink(pixels, [height, width], [rows, columns]) {
  const sums = new Float64Array(rows * columns * 4);
  const counts = new Float64Array(rows * columns);
  const put = (x, y, i) => {
    const at = y * columns + x;
    counts[at] += 1;
    for (let c = 0; c < 4; c++) sums[4 * at + c] += pixels[i + c];
  };
  if (width < columns || height < rows) {
    for (let y = 0; y < rows; y++)
      for (let x = 0; x < columns; x++)
        put(x, y, 4 * (Math.floor((y * height) / rows) * width + Math.floor((x * width) / columns)));
  } else {
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++)
        put(Math.floor((x * columns) / width), Math.floor((y * rows) / height), 4 * (y * width + x));
  }
  return Uint8ClampedArray.from(sums, (sum, i) => sum / counts[i >> 2]);
}

export default drawnBy(build);

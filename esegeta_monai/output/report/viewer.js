// Draws the maps of a page from its embedded volumes. Loads nothing, stores nothing.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const root = document.documentElement;
  if (!data.maps || !data.maps.length) {
    root.dataset.ready = "no maps";
    return;
  }
  const [SHOW, MONTAGE] = [9, 20]; // tiles of a montage: in the table, and large
  const state = {
    plane: 0, at: [...data.start], show: "slice", sign: "all", look: "overlay",
    threshold: 0, opacity: 0.8, palette: 0, scale: "map", channel: -1, outline: true, selected: 0,
  };
  const $ = (id) => document.getElementById(id);
  const bytesOf = (text) => Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
  const palettes = data.palettes.map((p) => ({ signed: bytesOf(p.signed), unsigned: bytesOf(p.unsigned) }));

  // ---- volumes ------------------------------------------------------------------------------------------------
  const volumes = new Map();

  async function unpack(id) {
    const tag = $(id);
    const stream = new Blob([bytesOf(tag.textContent)]).stream().pipeThrough(new DecompressionStream("deflate"));
    const raw = new Uint8Array(await new Response(stream).arrayBuffer());
    if (tag.dataset.delta) for (let i = 1; i < raw.length; i++) raw[i] += raw[i - 1];
    tag.remove(); // the text is needed only once
    return raw;
  }

  async function load() {
    for (const id of data.scan) volumes.set(id, await unpack(id));
    schedule();
    for (const map of data.maps) {
      for (const id of map.volumes) volumes.set(id, new Int8Array((await unpack(id)).buffer));
      if (map.mask && !volumes.has(map.mask)) volumes.set(map.mask, await unpack(map.mask));
      schedule();
    }
    root.dataset.ready = "yes";
  }

  const stride = [1, data.size[0], data.size[0] * data.size[1]];

  /** Voxel offset of every pixel of a slice, row by row from the top, without the offset along `through`. */
  function places(plane) {
    if (plane.places) return plane.places;
    const [w, h] = [data.size[plane.across], data.size[plane.up]];
    const offsets = new Uint32Array(w * h);
    for (let y = 0; y < h; y++)
      for (let x = 0; x < w; x++)
        offsets[y * w + x] = (plane.mirrored ? w - 1 - x : x) * stride[plane.across] + (h - 1 - y) * stride[plane.up];
    return (plane.places = offsets);
  }

  function cut(volume, plane, index) {
    const where = places(plane), from = index * stride[plane.through];
    const out = new volume.constructor(where.length);
    for (let i = 0; i < where.length; i++) out[i] = volume[where[i] + from];
    return out;
  }

  /** Projection along `through`: the value with the highest `weight` on each line. */
  function project(volume, plane, weight) {
    const where = places(plane), n = data.size[plane.through], step = stride[plane.through];
    const out = new volume.constructor(where.length);
    for (let i = 0; i < where.length; i++) {
      let best = -Infinity, value = 0;
      for (let k = 0; k < n; k++) {
        const v = volume[where[i] + k * step], rank = weight(v);
        if (rank > best) { best = rank; value = v; }
      }
      out[i] = value;
    }
    return out;
  }

  const projections = new Map();
  const WEIGHTS = {
    all: (v) => Math.abs(v), absolute: (v) => Math.abs(v), positive: (v) => v, negative: (v) => -v, plain: (v) => v,
  };
  function projected(id, plane, how) {
    const key = `${id} ${plane.name} ${how}`;
    if (!projections.has(key)) projections.set(key, project(volumes.get(id), plane, WEIGHTS[how]));
    return projections.get(key);
  }

  // ---- colours ------------------------------------------------------------------------------------------------
  function channelOf(map) {
    const wanted = state.channel < 0 ? map.channel : state.channel;
    return Math.min(wanted, map.volumes.length - 1);
  }

  function limitOf(map) {
    if (state.scale === "map") return map.limit;
    const together = data.maps.filter((m) => state.scale === "all" || m.method === map.method);
    return Math.max(...together.map((m) => m.limit));
  }

  /** RGBA of a share of the scale; alpha is 0 if it is not shown. */
  function colour(part, map) {
    const strength = Math.abs(part);
    if (!shown(part, map)) return [0, 0, 0, 0];
    const unsigned = !map.signed || state.sign === "absolute";
    const rgb = palettes[state.palette][unsigned ? "unsigned" : "signed"];
    const at = 3 * (unsigned ? Math.min(255, Math.round(strength * 255)) : Math.round((Math.max(-1, Math.min(1, part)) + 1) * 127.5));
    const alpha = state.look === "map" ? 1 : state.opacity * Math.min(1, strength / 0.5);
    return [rgb[at], rgb[at + 1], rgb[at + 2], 255 * alpha];
  }

  /** RGBA of each byte of a map, at byte + 128. */
  function colours(map) {
    const table = new Uint8ClampedArray(256 * 4);
    const factor = map.limit && limitOf(map) ? map.limit / limitOf(map) / data.levels : 0;
    for (let byte = -data.levels; byte <= data.levels; byte++) table.set(colour(byte * factor, map), (byte + 128) * 4);
    return table;
  }

  /** True if a share of the scale passes the selected sign and the threshold. */
  function shown(part, map) {
    if (part === 0 || Math.abs(part) < state.threshold) return false;
    if (state.sign === "positive" || !map.signed) return part > 0 && state.sign !== "negative";
    return state.sign === "negative" ? part < 0 : true;
  }

  // ---- drawing ------------------------------------------------------------------------------------------------
  const work = document.createElement("canvas");
  function pixels(w, h, fill) {
    work.width = w;
    work.height = h;
    const context = work.getContext("2d");
    const image = context.createImageData(w, h);
    fill(image.data);
    context.putImageData(image, 0, 0);
    return work;
  }

  function edges(context, mask, w, h, box, colour) {
    const [x0, y0, sx, sy] = [box[0], box[1], box[2] / w, box[3] / h];
    const path = new Path2D();
    const line = (ax, ay, bx, by) => { path.moveTo(x0 + ax * sx, y0 + ay * sy); path.lineTo(x0 + bx * sx, y0 + by * sy); };
    for (let y = 0; y < h; y++)
      for (let x = 0; x < w; x++) {
        if (!mask[y * w + x]) continue;
        if (x === 0 || !mask[y * w + x - 1]) line(x, y, x, y + 1);
        if (x === w - 1 || !mask[y * w + x + 1]) line(x + 1, y, x + 1, y + 1);
        if (y === 0 || !mask[(y - 1) * w + x]) line(x, y, x + 1, y);
        if (y === h - 1 || !mask[(y + 1) * w + x]) line(x, y + 1, x + 1, y + 1);
      }
    const ratio = Math.min(2, window.devicePixelRatio || 1), width = Math.max(0.5, Math.min(1.2, sx * 0.3)) * ratio;
    context.lineCap = "square";
    if (sx > 3) { context.strokeStyle = "rgb(0 0 0 / .5)"; context.lineWidth = 2 * width; context.stroke(path); }
    context.strokeStyle = colour; context.lineWidth = width; context.stroke(path);
  }

  /** Draw one tile: scan, map, outline. */
  function tile(context, map, plane, index, box) {
    const [w, h] = [data.size[plane.across], data.size[plane.up]];
    const mip = state.show === "mip";
    const channel = channelOf(map);
    const id = map.volumes[channel];
    const scanId = data.scan[Math.min(data.scan.length - 1, map.volumes.length > 1 ? channel : Math.max(0, state.channel))];
    const values = volumes.has(id) ? (mip ? projected(id, plane, map.signed ? state.sign : "plain") : cut(volumes.get(id), plane, index)) : null;
    const table = colours(map);
    if (scanId && volumes.has(scanId) && state.look !== "map") {
      const grey = mip ? projected(scanId, plane, "plain") : cut(volumes.get(scanId), plane, index);
      const masked = state.look === "masked" && values;
      const dim = mip && state.look !== "scan" ? 0.55 : 1;
      context.imageSmoothingEnabled = !masked;
      const image = pixels(w, h, (out) => {
        for (let i = 0; i < grey.length; i++) {
          const keep = !masked || table[(values[i] + 128) * 4 + 3] > 0;
          out[i * 4] = out[i * 4 + 1] = out[i * 4 + 2] = keep ? grey[i] * dim : 0;
          out[i * 4 + 3] = 255;
        }
      });
      context.drawImage(image, ...box);
    }
    if (values && (state.look === "overlay" || state.look === "map")) {
      context.imageSmoothingEnabled = false;
      const image = pixels(w, h, (out) => {
        for (let i = 0; i < values.length; i++) {
          const from = (values[i] + 128) * 4;
          out[i * 4] = table[from]; out[i * 4 + 1] = table[from + 1]; out[i * 4 + 2] = table[from + 2]; out[i * 4 + 3] = table[from + 3];
        }
      });
      context.drawImage(image, ...box);
    }
    const fine = box[2] / w > 1.5 * Math.min(2, window.devicePixelRatio || 1); // otherwise the outline hides the target
    if (state.outline && fine && map.mask && volumes.has(map.mask)) {
      const mask = mip ? projected(map.mask, plane, "plain") : cut(volumes.get(map.mask), plane, index);
      edges(context, mask, w, h, box, map.signed && state.sign !== "absolute" ? "#ffe000" : "#00e0ff");
    }
  }

  function draw(canvas, map, plane, tiles, cross) {
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    const high = (data.size[plane.up] * data.spacing[plane.up]) / (data.size[plane.across] * data.spacing[plane.across]);
    const montage = state.show === "montage";
    const columns = montage ? Math.ceil(Math.sqrt(tiles)) : 1, rows = montage ? Math.ceil(tiles / columns) : 1;
    const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    const height = Math.max(1, Math.round((width / columns) * high * rows));
    if (canvas.width !== width) canvas.width = width;
    if (canvas.height !== height) canvas.height = height;
    const context = canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    if (montage) {
      const n = data.size[plane.through], count = columns * rows;
      for (let i = 0; i < count; i++) {
        const index = Math.min(n - 1, Math.floor(((i + 0.5) * n) / count));
        tile(context, map, plane, index, [((i % columns) * width) / columns, (Math.floor(i / columns) * height) / rows, width / columns, height / rows]);
      }
    } else {
      tile(context, map, plane, state.at[plane.through], [0, 0, width, height]);
      if (cross && state.show === "slice") crosshair(context, plane, width, height, ratio);
    }
    canvas.setAttribute("aria-label", label(map, plane));
    canvas.dataset.slice = String(state.at[plane.through]);
  }

  function crosshair(context, plane, width, height, ratio) {
    const along = (axis, size, flipped) => ((flipped ? data.size[axis] - 1 - state.at[axis] : state.at[axis]) + 0.5) / data.size[axis] * size;
    const [x, y] = [along(plane.across, width, plane.mirrored), along(plane.up, height, true)], gap = 9 * ratio;
    context.strokeStyle = "rgb(255 255 255 / .7)";
    context.lineWidth = ratio * 0.8;
    context.beginPath();
    for (const [ax, ay, bx, by] of [[0, y, x - gap, y], [x + gap, y, width, y], [x, 0, x, y - gap], [x, y + gap, x, height]]) {
      if (bx > ax || by > ay) { context.moveTo(ax, ay); context.lineTo(bx, by); }
    }
    context.stroke();
  }

  function label(map, plane) {
    const what = { slice: data.planes.length > 1 ? `${plane.name} slice ${state.at[plane.through] + 1} of ${data.size[plane.through]}` : "image", montage: `${plane.name} montage`, mip: `${plane.name} maximum-intensity projection` }[state.show];
    return `${map.method}, ${map.target}: ${what}${data.oriented ? `, left of the picture is ${plane.left}` : ""}`;
  }

  // ---- texts --------------------------------------------------------------------------------------------------
  const short = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(Number(v.toPrecision(3))));
  const world = (at) => [0, 1, 2].map((r) => data.affine[r][3] + [0, 1, 2].reduce((sum, c) => sum + data.affine[r][c] * at[c], 0));

  function describe() {
    const map = data.maps[state.selected], plane = data.planes[state.plane];
    $("focus-title").textContent = `${map.method} · ${map.target}`;
    const volume = volumes.get(map.volumes[channelOf(map)]);
    let text = data.oriented ? `RAS ${world(state.at).map((v) => v.toFixed(1)).join(", ")} mm` : `voxel ${state.at.join(", ")}`;
    if (volume) {
      const byte = volume[state.at[0] * stride[0] + state.at[1] * stride[1] + state.at[2] * stride[2]];
      const edge = Math.abs(byte) === data.levels ? (byte > 0 ? "≥ " : "≤ ") : "≈ ";
      text += ` · ${edge}${short((byte / data.levels) * map.limit)} ${map.units}`;
    }
    if (map.volumes.length > 1) text += ` · ${map.channels[channelOf(map)]}`;
    $("readout").textContent = text;
    const mm = data.oriented && data.planes.length > 1 ? `, ${"xyz"[plane.through]} = ${world(state.at)[plane.through].toFixed(1)} mm` : "";
    $("slice-text").textContent = `${state.at[plane.through] + 1} of ${data.size[plane.through]}${mm}`;
    $("slice").max = String(data.size[plane.through] - 1);
    $("slice").value = String(state.at[plane.through]);
    $("threshold-text").textContent = `${Math.round(state.threshold * 100)} %`;
    $("opacity-text").textContent = `${Math.round(state.opacity * 100)} %`;
    bars();
  }

  /** Draw the colour scales of maps with and without sign; their ends are shares, or raw values on a raw scale. */
  function bars() {
    const selected = data.maps[state.selected];
    for (const box of document.querySelectorAll("[data-bar]")) {
      const signed = box.dataset.bar === "signed", unsigned = !signed || state.sign === "absolute";
      const map = selected.signed === signed ? selected : data.maps.find((m) => m.signed === signed);
      const context = box.querySelector("canvas").getContext("2d");
      context.clearRect(0, 0, 256, 12);
      context.fillStyle = "#595959"; // stands for mid-grey anatomy
      context.fillRect(0, 0, 256, 12);
      for (let x = 0; x < 256; x++) {
        const [r, g, b, a] = colour(unsigned ? x / 255 : x / 127.5 - 1, map);
        context.fillStyle = `rgb(${r} ${g} ${b} / ${a / 255})`;
        context.fillRect(x, 0, 1, 12);
      }
      const high = state.scale === "map" ? "100 %" : short(limitOf(map));
      const [low, , last] = box.querySelectorAll(".ends > span");
      low.textContent = unsigned ? "0" : `−${high}`;
      last.textContent = high;
      const whose = state.scale === "method" ? `, ${map.method}` : "";
      box.setAttribute("aria-label", `Colour scale of maps ${signed ? "with" : "without"} sign: ${low.textContent} to ${high}${whose}`);
    }
  }

  // ---- the whole page -----------------------------------------------------------------------------------------
  let waiting = false;
  function schedule() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; render(); });
  }

  function render() {
    const plane = data.planes[state.plane];
    for (const canvas of document.querySelectorAll("canvas.big")) {
      const own = data.planes[Number(canvas.dataset.plane)];
      draw(canvas, data.maps[state.selected], own, MONTAGE, true);
    }
    for (const canvas of document.querySelectorAll("canvas.small-map")) draw(canvas, data.maps[Number(canvas.dataset.map)], plane, SHOW, false);
    for (const button of document.querySelectorAll("button.cell")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.map) === state.selected));
      for (const [css, side] of [["l", "left"], ["r", "right"], ["t", "top"], ["b", "bottom"]]) {
        const letter = button.querySelector(`.lettered > .${css}`);
        if (letter) letter.textContent = plane[side];
      }
    }
    for (const record of document.querySelectorAll("[data-record]")) record.hidden = Number(record.dataset.record) !== state.selected;
    describe();
    root.dataset.drawn = String(Number(root.dataset.drawn || 0) + 1);
  }

  function go(axis, index) {
    state.at[axis] = Math.max(0, Math.min(data.size[axis] - 1, index));
    schedule();
  }

  function keys(event, plane) {
    const axis = plane.through, now = state.at[axis], last = data.size[axis] - 1;
    const to = { ArrowUp: now + 1, ArrowRight: now + 1, ArrowDown: now - 1, ArrowLeft: now - 1, PageUp: now + 5, PageDown: now - 5, Home: 0, End: last }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    go(axis, to);
  }

  function wheel(event, plane) {
    if (event.ctrlKey) return; // zooms the page
    event.preventDefault();
    go(plane.through, state.at[plane.through] + (event.deltaY < 0 ? 1 : -1));
  }

  for (const canvas of document.querySelectorAll("canvas.big")) {
    const plane = data.planes[Number(canvas.dataset.plane)];
    canvas.addEventListener("keydown", (event) => keys(event, plane));
    canvas.addEventListener("wheel", (event) => wheel(event, plane), { passive: false });
    const point = (event) => {
      if (state.show !== "slice" || !(event.buttons & 1)) return;
      const box = canvas.getBoundingClientRect();
      const across = Math.floor(((event.clientX - box.left) / box.width) * data.size[plane.across]);
      const down = Math.floor(((event.clientY - box.top) / box.height) * data.size[plane.up]);
      go(plane.across, plane.mirrored ? data.size[plane.across] - 1 - across : across);
      go(plane.up, data.size[plane.up] - 1 - down);
    };
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); point(event); });
    canvas.addEventListener("pointermove", point);
  }
  for (const button of document.querySelectorAll("button.cell")) {
    button.addEventListener("click", () => { state.selected = Number(button.dataset.map); schedule(); });
    button.addEventListener("keydown", (event) => keys(event, data.planes[state.plane]));
    // A wheel over the table scrolls the page until a map of it has been clicked.
    button.addEventListener("wheel", (event) => { if (document.activeElement === button) wheel(event, data.planes[state.plane]); }, { passive: false });
  }

  /** Make the pictures as large as fits side by side, until the reader sets their size. */
  function resize(pixels) {
    const grid = $("grid"), columns = grid.rows[0].cells.length - 1;
    const room = (grid.parentElement.clientWidth - grid.rows[0].cells[0].offsetWidth) / columns - 1;
    const size = pixels || Math.max(innerWidth < 1000 ? 150 : 118, Math.min(320, Math.floor(room)));
    grid.style.setProperty("--cell", `${size}px`);
    $("size").value = String(size);
  }

  const form = $("tools");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    const { name, id, value, checked } = event.target;
    if (name === "plane") state.plane = Number(value);
    else if (name === "look") {
      state.look = value;
      if (value === "masked" && state.threshold === 0) { state.threshold = 0.2; $("threshold").value = "20"; }
    } else if (name) state[name] = value;
    else if (id === "slice") state.at[data.planes[state.plane].through] = Number(value);
    else if (id === "threshold" || id === "opacity") state[id] = Number(value) / 100;
    else if (id === "palette" || id === "channel") state[id] = Number(value);
    else if (id === "scale") state.scale = value;
    else if (id === "outline") state.outline = checked;
    else if (id === "size") resize(Number(value));
    schedule();
  });
  new ResizeObserver(schedule).observe($("focus"));
  resize();

  // ---- 3D -----------------------------------------------------------------------------------------------------
  /** Return a volume as a NIfTI-1 file in memory, for NiiVue. */
  function nifti(values, signed, scale) {
    const buffer = new ArrayBuffer(352 + values.length), view = new DataView(buffer);
    const int16 = (at, v) => view.setInt16(at, v, true), float32 = (at, v) => view.setFloat32(at, v, true);
    view.setInt32(0, 348, true);
    [3, ...data.size, 1, 1, 1, 1].forEach((n, i) => int16(40 + 2 * i, n));
    int16(70, signed ? 256 : 2);
    int16(72, 8);
    [1, ...data.spacing, 0, 0, 0, 0].forEach((v, i) => float32(76 + 4 * i, v));
    float32(108, 352);
    float32(112, scale);
    view.setUint8(123, 2);
    int16(254, 1);
    data.affine.slice(0, 3).flat().forEach((v, i) => float32(280 + 4 * i, v));
    [0x6e, 0x2b, 0x31, 0].forEach((v, i) => view.setUint8(344 + i, v));
    new Uint8Array(buffer, 352).set(new Uint8Array(values.buffer));
    return buffer;
  }

  async function draw3d() {
    const canvas = $("gl");
    canvas.hidden = false;
    canvas.parentElement.classList.add("drawn"); // NiiVue makes the canvas as large as this
    const viewer = new window.niivue.Niivue({
      isColorbar: false, show3Dcrosshair: false, isResizeCanvas: true, backColor: [0, 0, 0, 1],
      clipPlaneColor: [0, 0, 0, 0], // transparent, so that the cut surface is visible
    });
    await viewer.attachToCanvas(canvas);
    const map = data.maps[state.selected];
    const files = [];
    if (data.scan.length) files.push({ url: nifti(volumes.get(data.scan[0]), false, 1), name: "scan.nii", colormap: "gray", opacity: 1 });
    const strength = Int8Array.from(volumes.get(map.volumes[channelOf(map)]), Math.abs);
    files.push({ url: nifti(strength, true, map.limit / data.levels), name: "map.nii", colormap: "warm", opacity: 0.8, cal_min: 0.3 * map.limit, cal_max: map.limit });
    for (const file of files) viewer.addVolume(await window.niivue.NVImage.loadFromUrl(file));
    viewer.setSliceType(viewer.sliceTypeRender);
    if (data.scan.length) viewer.setClipPlane([0.2, 270, 0]);
    root.dataset.three = "yes";
  }
  if ($("load-3d")) {
    $("load-3d").addEventListener("click", () => {
      draw3d().catch((error) => { $("load-3d").textContent = `The 3D view failed: ${error.message}`; root.dataset.three = "failed"; });
    });
  }

  load().catch((error) => {
    root.dataset.ready = "failed";
    $("readout").textContent = `The maps in this file cannot be read: ${error.message}`;
  });
})();

// One picture on a canvas: scan, map, outline, cross-hair; a slice, a montage or a projection.
(() => {
  "use strict";
  const viewer = (globalThis.esegetaViewer ??= {});

  /** Position and size of a whole plane on a rectangle, with zoom and centre. */
  viewer.boxOf = (state, size, plane, [x, y, w, h]) => {
    const share = (axis, flipped) => ((flipped ? size[axis] - 1 - state.centre[axis] : state.centre[axis]) + 0.5) / size[axis];
    const zoom = state.zoom, at = [share(plane.across, plane.mirrored), share(plane.up, true)];
    const inside = (middle) => Math.min(0, Math.max(1 - zoom, 0.5 - middle * zoom)); // no empty border
    return [x + inside(at[0]) * w, y + inside(at[1]) * h, w * zoom, h * zoom];
  };

  /** Colour of the target's outline: one that the colours of the map do not have. */
  viewer.outlineColour = (state, map) => (map.signed && state.sign !== "absolute" ? "#ffe000" : "#00e0ff");

  viewer.Painter = class {
    constructor(data, state, volumes, palettes) {
      Object.assign(this, { data, state, volumes, palettes });
      this.work = document.createElement("canvas");
      this.tables = new Map();
      this.scans = new Map();
    }

    /** Forget what depends on settings; called before every drawing of the page. */
    reset() {
      this.tables.clear();
      this.scans.clear();
    }

    channelOf(map) {
      const wanted = this.state.channel < 0 ? map.channel : this.state.channel;
      return Math.min(wanted, map.volumes.length - 1);
    }

    /** A canvas of a slice's size whose pixels `fill` writes as 32-bit RGBA. */
    pixels(w, h, fill, canvas = this.work) {
      canvas.width = w;
      canvas.height = h;
      const context = canvas.getContext("2d"), image = context.createImageData(w, h);
      fill(new Uint32Array(image.data.buffer));
      context.putImageData(image, 0, 0);
      return canvas;
    }

    tableOf(map) {
      if (!this.tables.has(map)) this.tables.set(map, new Uint32Array(viewer.colours(this.data, this.state, this.palettes, map).buffer));
      return this.tables.get(map);
    }

    /** A canvas with a slice of the scan, in grey or in colour; null while it is not loaded. */
    scanOf(map, plane, index) {
      const { scan } = this.data, { state, volumes } = this;
      if (!scan) return null;
      const own = map.volumes.length > 1 ? this.channelOf(map) : Math.max(0, state.channel);
      const one = scan.channels[Math.min(scan.channels.length - 1, own)];
      const shown = scan.colour && state.channel < 0 ? scan.channels : [one, one, one];
      if (!shown.every((c) => volumes.has(c.id))) return null;
      const key = `${shown.map((c) => c.id)} ${plane.name} ${index}`;
      if (!this.scans.has(key)) {
        const cuts = new Map(), tables = shown.map((c) => viewer.greys(scan, c, state.window));
        for (const c of shown)
          if (!cuts.has(c.id)) cuts.set(c.id, index === null ? volumes.project(c.id, plane, "positive") : volumes.cut(c.id, plane, index));
        const [r, g, b] = shown.map((c) => cuts.get(c.id)), [tr, tg, tb] = tables;
        const { size } = this.data;
        this.scans.set(key, this.pixels(size[plane.across], size[plane.up], (out) => {
          for (let i = 0; i < out.length; i++) out[i] = 0xff000000 | (tb[b[i]] << 16) | (tg[g[i]] << 8) | tr[r[i]];
        }, document.createElement("canvas")));
      }
      return this.scans.get(key);
    }

    /** Draw one tile on a rectangle; return false while the map is not loaded. */
    tile(context, map, plane, index, rectangle) {
      const { data, state, volumes } = this, [w, h] = [data.size[plane.across], data.size[plane.up]];
      const box = viewer.boxOf(state, data.size, plane, rectangle), id = map.volumes[this.channelOf(map)];
      const loaded = volumes.has(id), table = loaded ? this.tableOf(map) : null;
      const how = map.signed ? state.sign : "positive";
      const values = !loaded ? null : index === null ? volumes.project(id, plane, how) : volumes.cut(id, plane, index);
      const scan = state.look === "map" ? null : this.scanOf(map, plane, index);
      context.save();
      context.beginPath();
      context.rect(...rectangle);
      context.clip();
      const masked = state.look === "masked" && values;
      if (scan) {
        context.imageSmoothingEnabled = !masked;
        context.globalAlpha = index === null && state.look !== "scan" ? 0.55 : 1;
        context.drawImage(scan, ...box);
        context.globalAlpha = 1;
      }
      if (values && state.look !== "scan") {
        context.imageSmoothingEnabled = false;
        const image = this.pixels(w, h, (out) => {
          const zero = map.levels; // masked: black where the map is not shown
          if (masked) for (let i = 0; i < out.length; i++) out[i] = table[values[i] + zero] >>> 24 ? 0 : 0xff000000;
          else for (let i = 0; i < out.length; i++) out[i] = table[values[i] + zero];
        });
        context.drawImage(image, ...box);
      }
      if (state.outline && map.mask && volumes.has(map.mask)) {
        this.outline(context, volumes.outline(map.mask, plane, index), box, [w, h], viewer.outlineColour(state, map));
      }
      context.restore();
      return loaded;
    }

    /** Draw sides of voxels: thick with a dark rim where voxels are large, at least one pixel where they are small. */
    outline(context, sides, box, [w, h], colour) {
      const path = new Path2D(), [sx, sy] = [box[2] / w, box[3] / h];
      for (let i = 0; i < sides.length; i += 4) {
        path.moveTo(box[0] + sides[i] * sx, box[1] + sides[i + 1] * sy);
        path.lineTo(box[0] + sides[i + 2] * sx, box[1] + sides[i + 3] * sy);
      }
      const ratio = Math.min(2, globalThis.devicePixelRatio || 1), width = Math.max(1, Math.min(1.4, sx * 0.3) * ratio);
      context.lineCap = "square";
      if (sx > 3) {
        context.strokeStyle = "rgb(0 0 0 / .5)";
        context.lineWidth = 2 * width;
        context.stroke(path);
      }
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.stroke(path);
    }

    /** Draw a canvas; `tiles`: of a montage; `cross`: with a cross-hair. */
    draw(canvas, map, plane, tiles, cross) {
      const { data, state } = this, ratio = Math.min(2, globalThis.devicePixelRatio || 1);
      const high = (data.size[plane.up] * data.spacing[plane.up]) / (data.size[plane.across] * data.spacing[plane.across]);
      const montage = state.show === "montage" && data.size[plane.through] > 1;
      const columns = montage ? Math.ceil(Math.sqrt(tiles)) : 1, rows = montage ? Math.ceil(tiles / columns) : 1;
      const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
      const height = Math.max(1, Math.round((width / columns) * high * rows));
      if (canvas.width !== width) canvas.width = width;
      if (canvas.height !== height) canvas.height = height;
      const context = canvas.getContext("2d");
      context.fillStyle = "#000";
      context.fillRect(0, 0, width, height);
      let loaded = true;
      if (map.bars && !canvas.classList.contains("big")) viewer.drawBars(context, map, width, height);
      else if (montage) {
        const n = data.size[plane.through], count = columns * rows;
        for (let i = 0; i < count; i++) {
          const index = Math.min(n - 1, Math.floor(((i + 0.5) * n) / count));
          const at = [((i % columns) * width) / columns, (Math.floor(i / columns) * height) / rows];
          loaded = this.tile(context, map, plane, index, [...at, width / columns, height / rows]) && loaded;
        }
      } else {
        const index = state.show === "mip" && data.size[plane.through] > 1 ? null : state.at[plane.through];
        loaded = this.tile(context, map, plane, index, [0, 0, width, height]);
        if (cross && index !== null && data.size[plane.through] > 1) this.crosshair(context, plane, width, height, ratio);
      }
      if (!loaded) {
        context.fillStyle = "#fff";
        context.font = `${12 * ratio}px system-ui, sans-serif`;
        context.textAlign = "center";
        context.fillText("loading", width / 2, height / 2);
      }
      canvas.dataset.state = loaded ? "drawn" : "loading";
      canvas.dataset.slice = String(state.at[plane.through]);
      canvas.setAttribute("aria-label", this.label(map, plane));
    }

    crosshair(context, plane, width, height, ratio) {
      const { state, data } = this, box = viewer.boxOf(state, data.size, plane, [0, 0, width, height]);
      const along = (axis, flipped) => ((flipped ? data.size[axis] - 1 - state.at[axis] : state.at[axis]) + 0.5) / data.size[axis];
      const x = box[0] + along(plane.across, plane.mirrored) * box[2], y = box[1] + along(plane.up, true) * box[3];
      const gap = 9 * ratio;
      context.strokeStyle = "rgb(255 255 255 / .7)";
      context.lineWidth = ratio * 0.8;
      context.beginPath();
      for (const [ax, ay, bx, by] of [[0, y, x - gap, y], [x + gap, y, width, y], [x, 0, x, y - gap], [x, y + gap, x, height]])
        if (bx > ax || by > ay) { context.moveTo(ax, ay); context.lineTo(bx, by); }
      context.stroke();
    }

    label(map, plane) {
      const { data, state } = this, n = data.size[plane.through];
      const what = n === 1 ? "image" : {
        slice: `${plane.name} slice ${state.at[plane.through] + 1} of ${n}`,
        montage: `${plane.name} montage`,
        mip: `${plane.name} maximum-intensity projection`,
      }[state.show];
      return `${map.method}, ${map.name}: ${what}${data.oriented ? `, left of the picture is ${plane.left}` : ""}`;
    }
  };
})();

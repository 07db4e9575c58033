// The viewer: its state, its controls, and `esegetaViewer.mount`, the entry point (see README.md).
(() => {
  "use strict";
  const viewer = (globalThis.esegetaViewer ??= {});
  const [SHOW, MONTAGE] = [9, 20]; // tiles of a montage: in the table, and large

  class Viewer {
    constructor({ root, data, read }) {
      this.root = root;
      this.data = data;
      this.state = {
        plane: 0, at: [...data.start], centre: [...data.start], show: "slice", sign: "all", look: "overlay", drag: "cross",
        threshold: null, opacity: 0.5, palette: 0, scale: "map", min: 0, max: null, log: false, channel: -1,
        outline: true, selected: data.first, second: -1, window: null, zoom: 1, moved: false,
      };
      this.palettes = data.palettes.map((p) => ({ signed: viewer.bytesOf(p.signed), unsigned: viewer.bytesOf(p.unsigned) }));
      this.volumes = new viewer.Volumes(data, read);
      this.painter = new viewer.Painter(data, this.state, this.volumes, this.palettes);
      this.waiting = this.resting = false;
      this.stale = new Set();
    }

    $(id) { return this.root.querySelector(`#${id}`); }
    all(selector) { return [...this.root.querySelectorAll(selector)]; }
    get map() { return this.data.maps[this.state.selected]; }
    /** The map beside the selected one, or undefined; both have the same cross-hair, zoom and settings. */
    get second() { return this.data.maps[this.state.second]; }
    planeOf(canvas) { return this.data.planes[Number(canvas.dataset.plane ?? canvas.dataset.second)]; }
    get plane() { return this.data.planes[this.state.plane]; }

    /** Load the selected map, its target and the scan first, then the others. */
    async load() {
      const { data, volumes } = this;
      const loadMap = async (map) => {
        for (const id of map.volumes) await volumes.load(id, true);
        await volumes.load(map.mask);
        this.schedule(map);
      };
      for (const channel of data.scan ? data.scan.channels : []) await volumes.load(channel.id);
      this.schedule();
      await loadMap(this.map);
      for (const map of data.maps) await loadMap(map);
    }

    /** Draw in the next frame: the pictures of one map that was loaded, or all after a change of the state. */
    schedule(map = null) {
      for (const canvas of this.all("canvas.big, canvas.small-map"))
        if (this.mapOf(canvas) && (map === null || this.mapOf(canvas) === map)) this.stale.add(canvas);
      this.root.dataset.pending = String(this.stale.size);
      if (this.waiting) return;
      this.waiting = true;
      requestAnimationFrame(() => { this.waiting = false; this.render(); });
    }

    mapOf(canvas) {
      if (canvas.dataset.second !== undefined) return this.second;
      return canvas.classList.contains("big") ? this.map : this.data.maps[Number(canvas.dataset.map)];
    }

    /** Draw what is in sight, then the rest one by one while nothing else happens. */
    render() {
      const { state, painter, map, plane } = this;
      painter.reset();
      this.$("planes").hidden = Boolean(map.bars);
      this.$("bars").hidden = !map.bars;
      if (map.bars) viewer.writeBars(this.$("bars"), map);
      for (const button of this.all("button.cell")) {
        button.setAttribute("aria-pressed", String(Number(button.dataset.map) === state.selected));
        for (const [css, side] of [["l", "left"], ["r", "right"], ["t", "top"], ["b", "bottom"]]) {
          const letter = button.querySelector(`.lettered > .${css}`);
          if (letter) letter.textContent = plane[side];
        }
      }
      this.renderPair();
      for (const part of this.all("[data-record]")) part.hidden = Number(part.dataset.record) !== state.selected;
      for (const canvas of [...this.stale]) {
        const { top, bottom } = canvas.getBoundingClientRect();
        if (bottom > -200 && top < innerHeight + 200) this.draw(canvas);
      }
      this.describe();
      this.drawRest();
    }

    /** Show the second map beside the first, each with its title and colour scale. */
    renderPair() {
      const { second, map } = this, box = this.$("second-box");
      if (!box) return;
      box.hidden = !second;
      this.$("pair").classList.toggle("two-maps", Boolean(second));
      this.$("pair-first").hidden = !second;
      if (!second) return;
      const title = (m) => `${m.method} · ${m.name}`;
      [this.$("pair-first").textContent, this.$("pair-second").textContent] = [title(map), title(second)];
      const [low, high] = viewer.drawScale(this.$("second-bar"), this.data, this.state, this.palettes, second);
      for (const [id, text] of [["low", low], ["high", high], ["low-means", second.low], ["high-means", second.high]]) this.$(`second-${id}`).textContent = text;
      this.$("second-legend").setAttribute("aria-label", `Colour scale of the second map from ${low} to ${high}`);
    }

    draw(canvas) {
      const big = canvas.classList.contains("big"), map = this.mapOf(canvas);
      if (map && !(big && map.bars)) {
        const plane = big ? this.planeOf(canvas) : this.plane;
        this.painter.draw(canvas, map, plane, big ? MONTAGE : SHOW, big);
      }
      this.stale.delete(canvas);
      this.root.dataset.pending = String(this.stale.size);
    }

    drawRest() {
      if (this.resting || !this.stale.size) return;
      this.resting = true;
      setTimeout(() => {
        this.resting = false;
        const [canvas] = this.stale;
        if (canvas && !this.waiting) this.draw(canvas);
        this.drawRest();
      }, 0);
    }

    drawAll() { for (const canvas of [...this.stale]) this.draw(canvas); }

    world(at) {
      const a = this.data.affine;
      return [0, 1, 2].map((r) => a[r][3] + [0, 1, 2].reduce((sum, c) => sum + a[r][c] * at[c], 0));
    }

    /** Write texts and positions of controls that follow from the state. */
    describe() {
      const { data, state, map, plane, volumes, painter } = this, id = map.volumes[painter.channelOf(map)];
      this.$("focus-title").textContent = `${map.method} · ${map.name}`;
      let text = data.oriented ? `RAS ${this.world(state.at).map((v) => v.toFixed(1)).join(", ")} mm` : `voxel ${state.at.join(", ")}`;
      if (volumes.has(id)) text += ` · ≈ ${viewer.short(viewer.valueOf(map, volumes.at(id, state.at)))} ${map.units}`;
      if (map.volumes.length > 1) text += ` · ${map.channels[painter.channelOf(map)]}`;
      const { second } = this, other = second && second.volumes[painter.channelOf(second)];
      if (second && volumes.has(other)) text += ` · second map ≈ ${viewer.short(viewer.valueOf(second, volumes.at(other, state.at)))} ${second.units}`;
      const shownChannel = data.scan && data.scan.channels[Math.min(data.scan.channels.length - 1, Math.max(0, state.channel))];
      if (shownChannel && volumes.has(shownChannel.id)) {
        const value = shownChannel.low + (volumes.at(shownChannel.id, state.at) / data.scan.levels) * (shownChannel.high - shownChannel.low);
        text += ` · scan ≈ ${viewer.short(value)}${data.scan.hounsfield ? " HU" : ""}`;
      }
      this.$("readout").textContent = map.bars ? "one value for each channel" : text;
      const n = data.size[plane.through], mm = data.oriented && n > 1 ? `, ${"xyz"[plane.through]} = ${this.world(state.at)[plane.through].toFixed(1)} mm` : "";
      this.$("slice-text").textContent = `${state.at[plane.through] + 1} of ${n}${mm}`;
      this.$("slice").max = String(n - 1);
      this.$("slice").value = String(state.at[plane.through]);
      this.$("slice-box").hidden = n === 1 || state.show !== "slice" || Boolean(map.bars);
      const threshold = viewer.thresholdOf(state, map);
      this.$("threshold").value = String(Math.round(threshold * 100));
      this.$("threshold-text").textContent = `${Math.round(threshold * 100)} %`;
      this.$("opacity-text").textContent = `${Math.round(state.opacity * 100)} %`;
      this.$("zoom-text").textContent = `${Math.round(state.zoom * 100)} %`;
      this.write("scale-min", state.min);
      this.write("scale-max", viewer.limitOf(data, state, map));
      if (shownChannel) {
        const [low, high] = state.window ?? shownChannel.window;
        this.write("level", (low + high) / 2);
        this.write("width", high - low);
      }
      const [low, high] = viewer.drawScale(this.$("legend-bar"), data, state, this.palettes, map);
      this.$("legend-low").textContent = low;
      this.$("legend-high").textContent = high;
      this.$("legend-units").textContent = `${map.units}${state.log ? ", logarithmic" : ""}`;
      this.$("legend-low-means").textContent = map.low;
      this.$("legend-high-means").textContent = map.high;
      this.$("legend").setAttribute("aria-label", `Colour scale from ${low}, ${map.low}, to ${high}, ${map.high}`);
      for (const swatch of this.all(".outline-swatch")) swatch.style.borderTopColor = viewer.outlineColour(state, map);
      const beyond = viewer.saturated(data, state, volumes, map, id) ?? (state.max === null && state.scale === "map" ? map.saturated : null);
      this.$("saturated").textContent = beyond === null ? "" : `${viewer.short(100 * beyond)} % of the target's voxels lie beyond the end of the colours.`;
    }

    /** Write a number into its field, unless the reader is typing there. */
    write(id, value) {
      const field = this.$(id);
      if (field && field !== document.activeElement) field.value = String(Number(value.toPrecision(4)));
    }

    go(axis, index) {
      this.state.at[axis] = Math.max(0, Math.min(this.data.size[axis] - 1, index));
      this.state.moved = true;
      this.schedule();
    }

    /** Select a map; until the reader has moved the planes, they show its target's largest cross-sections. */
    select(index) {
      this.state.selected = index;
      if (!this.state.moved) this.look(this.map.start);
      this.schedule();
    }

    look(at) {
      this.state.at = [...at];
      this.state.centre = [...at];
      this.schedule();
    }

    zoom(factor, at = this.state.at) {
      this.state.zoom = Math.max(1, Math.min(32, this.state.zoom * factor));
      if (factor > 1) this.state.centre = [...at];
      this.schedule();
    }

    keys(event, plane) {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const axis = plane.through, now = this.state.at[axis], last = this.data.size[axis] - 1;
      const zoom = { "+": 1.5, "=": 1.5, "-": 1 / 1.5, 0: 1e-9 }[event.key];
      const to = { ArrowUp: now + 1, ArrowRight: now + 1, ArrowDown: now - 1, ArrowLeft: now - 1, PageUp: now + 5, PageDown: now - 5, Home: 0, End: last }[event.key];
      if (zoom === undefined && to === undefined) return;
      event.preventDefault();
      if (zoom !== undefined) this.zoom(zoom);
      else this.go(axis, to);
    }

    wheel(event, plane) {
      event.preventDefault();
      if (event.ctrlKey) this.zoom(event.deltaY < 0 ? 1.25 : 0.8);
      else this.go(plane.through, this.state.at[plane.through] + (event.deltaY < 0 ? 1 : -1));
    }

    /** Voxel under the pointer, as a fraction along the axes of a plane. */
    under(event, canvas, plane) {
      const { state, data } = this, rect = canvas.getBoundingClientRect();
      const box = viewer.boxOf(state, data.size, plane, [0, 0, rect.width, rect.height]);
      const across = ((event.clientX - rect.left - box[0]) / box[2]) * data.size[plane.across];
      const down = ((event.clientY - rect.top - box[1]) / box[3]) * data.size[plane.up];
      return [plane.mirrored ? data.size[plane.across] - across : across, data.size[plane.up] - down];
    }

    bind(canvas) {
      const plane = this.planeOf(canvas), { state } = this;
      let last = null;
      canvas.addEventListener("keydown", (event) => this.keys(event, plane));
      canvas.addEventListener("wheel", (event) => this.wheel(event, plane), { passive: false });
      canvas.addEventListener("dblclick", (event) => { event.preventDefault(); this.zoom(2); });
      canvas.addEventListener("contextmenu", (event) => event.preventDefault());
      const point = (event) => {
        if (state.show !== "slice") return;
        const [across, up] = this.under(event, canvas, plane).map(Math.floor);
        this.go(plane.across, across);
        this.go(plane.up, up);
      };
      canvas.addEventListener("pointerdown", (event) => {
        canvas.setPointerCapture(event.pointerId);
        last = [event.clientX, event.clientY];
        if (state.drag === "cross" && event.button === 0 && !event.shiftKey) point(event);
      });
      canvas.addEventListener("pointermove", (event) => {
        if (!last || !event.buttons) return;
        const rect = canvas.getBoundingClientRect(), [dx, dy] = [event.clientX - last[0], event.clientY - last[1]];
        last = [event.clientX, event.clientY];
        if (state.drag === "window" || event.buttons & 2) this.drawWindow(dx / rect.width, dy / rect.height);
        else if (state.drag === "pan" || event.shiftKey || event.buttons & 4) {
          const { size } = this.data, { across, up, mirrored } = plane;
          const limit = (axis, v) => Math.max(0, Math.min(size[axis] - 1, v));
          state.centre[across] = limit(across, state.centre[across] - ((mirrored ? -1 : 1) * dx * size[across]) / (rect.width * state.zoom));
          state.centre[up] = limit(up, state.centre[up] + (dy * size[up]) / (rect.height * state.zoom));
          this.schedule();
        } else point(event);
      });
      canvas.addEventListener("pointerup", () => { last = null; });
    }

    /** Change width (sideways) and level (upwards) of the grey scale by shares of its width. */
    drawWindow(across, down) {
      const channel = this.data.scan?.channels[0];
      if (!channel) return;
      const [low, high] = this.state.window ?? channel.window, width = high - low;
      const wide = Math.max(1e-9, width * (1 + 2 * across)), level = (low + high) / 2 - 2 * down * width;
      this.state.window = [level - wide / 2, level + wide / 2];
      this.$("preset").value = "own";
      this.schedule();
    }

    /** Set the grey scale: the percentiles of each channel, or a preset of CT. */
    preset(name) {
      const { state, data } = this, known = viewer.PRESETS[name];
      if (known) state.window = [known[0] - known[1] / 2, known[0] + known[1] / 2];
      else if (name === "full") state.window = [Math.min(...data.scan.channels.map((c) => c.low)), Math.max(...data.scan.channels.map((c) => c.high))];
      else if (name === "percentiles") state.window = null;
    }

    /** Make the pictures of the table as large as fits side by side, until the reader sets their size. */
    resize(pixels) {
      const grid = this.$("grid"), columns = grid.rows[0].cells.length - 1;
      const room = (grid.parentElement.clientWidth - grid.rows[0].cells[0].offsetWidth) / columns - 1;
      const size = pixels || Math.max(innerWidth < 1000 ? 150 : 118, Math.min(320, Math.floor(room)));
      grid.style.setProperty("--cell", `${size}px`);
      this.$("size").value = String(size);
    }

    input({ name, id, value, checked }) {
      const { state } = this, number = Number(value);
      if (name === "plane") state.plane = number;
      else if (name === "look") {
        state.look = value;
        if (value === "masked" && viewer.thresholdOf(state, this.map) === 0) state.threshold = 0.2;
      } else if (name) state[name] = value;
      else if (id === "slice") this.go(this.plane.through, number);
      else if (id === "threshold" || id === "opacity") state[id] = number / 100;
      else if (id === "palette" || id === "channel" || id === "second") state[id] = number;
      else if (id === "scale") [state.scale, state.max] = [value, null];
      else if (id === "scale-min" && value !== "" && number >= 0) state.min = number;
      else if (id === "scale-max" && number > 0) state.max = number;
      else if (id === "log" || id === "outline") state[id] = checked;
      else if (id === "preset") this.preset(value);
      else if ((id === "level" || id === "width") && value !== "") {
        const [level, width] = [Number(this.$("level").value), Number(this.$("width").value)];
        if (width > 0) state.window = [level - width / 2, level + width / 2];
        this.$("preset").value = "own";
      } else if (id === "size") this.resize(number);
      this.schedule();
    }

    listen() {
      for (const canvas of this.all("canvas.big")) this.bind(canvas);
      for (const button of this.all("button.cell")) {
        button.addEventListener("click", () => this.select(Number(button.dataset.map)));
        button.addEventListener("keydown", (event) => this.keys(event, this.plane));
        // A wheel over the table scrolls the page until a map of it has been clicked.
        button.addEventListener("wheel", (event) => { if (document.activeElement === button) this.wheel(event, this.plane); }, { passive: false });
      }
      for (const form of [this.$("tools"), this.$("table-tools")]) {
        form.addEventListener("submit", (event) => event.preventDefault());
        form.addEventListener("input", (event) => this.input(event.target));
      }
      this.$("zoom-in").addEventListener("click", () => this.zoom(1.5));
      this.$("zoom-out").addEventListener("click", () => this.zoom(1 / 1.5));
      this.$("zoom-reset").addEventListener("click", () => this.zoom(1e-9));
      this.$("scale-reset").addEventListener("click", () => { Object.assign(this.state, { min: 0, max: null, scale: "map" }); this.$("scale").value = "map"; this.schedule(); });
      this.$("to-target").addEventListener("click", () => this.look(this.map.start));
      this.$("to-peak").addEventListener("click", () => this.look(this.map.peak));
      const three = this.$("load-3d");
      if (three) three.addEventListener("click", () => {
        viewer.draw3d(this.$("gl"), this.data, this.state, this.volumes, this.painter, this.map)
          .then(() => { this.root.dataset.three = "yes"; })
          .catch((error) => { three.textContent = `The 3D view failed: ${error.message}`; this.root.dataset.three = "failed"; });
      });
      new ResizeObserver(() => this.schedule()).observe(this.$("focus"));
      addEventListener("beforeprint", () => { this.schedule(); this.drawAll(); });
    }
  }

  /** Show a case in the elements of `root`; return the viewer. `root.dataset.ready` is "yes" once all is loaded. */
  viewer.mount = (options) => {
    const shown = new Viewer(options);
    shown.listen();
    shown.resize();
    shown.schedule();
    shown.load()
      .then(() => { shown.root.dataset.ready = "yes"; })
      .catch((error) => {
        shown.root.dataset.ready = "failed";
        shown.$("readout").textContent = `The maps in this file cannot be read: ${error.message}`;
      });
    return shown;
  };
})();

// Charts of maps with one value for each channel, and colour bars.
(() => {
  "use strict";
  const viewer = (globalThis.esegetaViewer ??= {});
  const RED = "#d1120b", BLUE = "#5b8cff";

  /** Draw the bars of a map on a small canvas. */
  viewer.drawBars = (context, map, width, height) => {
    const most = Math.max(...map.bars.map((b) => Math.abs(b.value))) || 1, row = height / map.bars.length;
    const signed = map.bars.some((b) => b.value < 0), zero = signed ? width * 0.5 : width * 0.04;
    const room = signed ? width * 0.46 : width * 0.92;
    context.font = `${Math.max(9, Math.min(row * 0.35, width / 14))}px system-ui, sans-serif`;
    map.bars.forEach((bar, i) => {
      const long = (room * bar.value) / most;
      context.fillStyle = bar.value < 0 ? BLUE : RED;
      context.fillRect(Math.min(zero, zero + long), (i + 0.45) * row, Math.max(1, Math.abs(long)), row * 0.4);
      context.fillStyle = "#fff";
      context.fillText(bar.name, width * 0.04, (i + 0.36) * row);
    });
  };

  /** Write the bars of a map as a table with meters of HTML. */
  viewer.writeBars = (box, map) => {
    const most = Math.max(...map.bars.map((b) => Math.abs(b.value))) || 1;
    box.replaceChildren(...map.bars.map((bar) => {
      const row = document.createElement("div"), name = document.createElement("span");
      const track = document.createElement("span"), fill = document.createElement("span"), value = document.createElement("span");
      row.className = "bar-of";
      track.className = "track";
      fill.className = bar.value < 0 ? "fill neg" : "fill pos";
      fill.style.width = `${(50 * Math.abs(bar.value)) / most}%`;
      fill.style.left = `${bar.value < 0 ? 50 - (50 * Math.abs(bar.value)) / most : 50}%`;
      name.textContent = bar.name;
      value.textContent = viewer.short(bar.value) + (typeof bar.error === "number" && bar.error > 0 ? ` ± ${viewer.short(bar.error)}` : "");
      track.append(fill);
      row.append(name, track, value);
      return row;
    }));
  };

  /** Draw the colour scale of a map as it appears on mid-grey anatomy; return the texts of its ends. */
  viewer.drawScale = (canvas, data, state, palettes, map) => {
    const context = canvas.getContext("2d"), { width, height } = canvas;
    const unsigned = !map.signed || state.sign === "absolute";
    context.fillStyle = "#595959";
    context.fillRect(0, 0, width, height);
    for (let x = 0; x < width; x++) {
      const share = x / (width - 1), part = unsigned ? share : 2 * share - 1;
      const value = Math.sign(part) * viewer.valueAt(data, state, map, Math.abs(part));
      const [r, g, b, a] = viewer.colourOf(data, state, palettes, map, value);
      context.fillStyle = `rgb(${r} ${g} ${b} / ${a / 255})`;
      context.fillRect(x, 0, 1, height);
    }
    const high = viewer.short(viewer.limitOf(data, state, map));
    return [unsigned ? viewer.short(viewer.valueAt(data, state, map, 0)) : `−${high}`, high];
  };
})();

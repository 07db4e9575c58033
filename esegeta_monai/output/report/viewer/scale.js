// Scales: steps to values, values to places on the colour scale, places to colours; grey scales of the scan.
(() => {
  "use strict";
  const viewer = (globalThis.esegetaViewer ??= {});
  const DECADES = 3; // of a logarithmic scale
  const OPAQUE_AT = 0.4; // share of the scale from which the map has its full opacity

  /** Presets of the grey scale of a CT: level and width in Hounsfield units. */
  viewer.PRESETS = { brain: [40, 80], bone: [400, 1800], lung: [-600, 1500], abdomen: [50, 400] };

  viewer.valueOf = (map, step) =>
    map.extreme ? map.knee * Math.sinh((step / map.levels) * Math.asinh(map.extreme / map.knee)) : 0;

  /** The step next to a value, not rounded. */
  viewer.stepOf = (map, value) =>
    map.extreme ? (map.levels * Math.asinh(value / map.knee)) / Math.asinh(map.extreme / map.knee) : 0;

  viewer.limitOf = (data, state, map) => {
    if (state.max !== null) return state.max;
    if (state.scale === "map") return map.limit;
    const together = data.maps.filter((m) => !m.bars && (state.scale === "all" || m.method === map.method));
    return Math.max(...together.map((m) => m.limit), 0);
  };

  viewer.thresholdOf = (state, map) => state.threshold ?? map.threshold;

  /** Place of a value on the scale, 0 to 1 and beyond, without sign; negative below the minimum. */
  viewer.placeOf = (data, state, map, value) => {
    const limit = viewer.limitOf(data, state, map), strength = Math.abs(value);
    if (!(limit > 0) || strength === 0) return 0;
    if (strength < state.min) return -1;
    if (!state.log) return (strength - state.min) / Math.max(limit - state.min, 1e-300);
    return 1 + Math.log10(strength / limit) / DECADES;
  };

  /** The value at a place of the scale, the inverse of `placeOf`. */
  viewer.valueAt = (data, state, map, place) => {
    const limit = viewer.limitOf(data, state, map);
    return state.log ? limit * 10 ** (DECADES * (place - 1)) : state.min + place * (limit - state.min);
  };

  /** True if a value at this place passes the selected sign and the threshold. */
  viewer.isShown = (state, map, value, place) => {
    if (value === 0 || place < 0 || place < viewer.thresholdOf(state, map)) return false;
    if (state.sign === "positive" || !map.signed) return value > 0 && state.sign !== "negative";
    return state.sign === "negative" ? value < 0 : true;
  };

  /** RGBA (alpha 0 to 255) of a value. */
  viewer.colourOf = (data, state, palettes, map, value) => {
    const place = viewer.placeOf(data, state, map, value);
    if (!viewer.isShown(state, map, value, place)) return [0, 0, 0, 0];
    const unsigned = !map.signed || state.sign === "absolute", part = Math.min(1, Math.max(0, place));
    const rgb = palettes[state.palette][unsigned ? "unsigned" : "signed"];
    const at = 3 * Math.round(unsigned ? part * 255 : (Math.sign(value) * part + 1) * 127.5);
    const alpha = state.look === "map" ? 1 : state.opacity * Math.min(1, part / OPAQUE_AT);
    return [rgb[at], rgb[at + 1], rgb[at + 2], 255 * alpha];
  };

  /** RGBA of each step of a map, at step + levels. */
  viewer.colours = (data, state, palettes, map) => {
    const table = new Uint8ClampedArray((2 * map.levels + 1) * 4);
    for (let step = -map.levels; step <= map.levels; step++)
      table.set(viewer.colourOf(data, state, palettes, map, viewer.valueOf(map, step)), (step + map.levels) * 4);
    return table;
  };

  /** Grey value 0 to 255 of each level of a channel of the scan. */
  viewer.greys = (scan, channel, window) => {
    const [low, high] = window ?? channel.window, table = new Uint8ClampedArray(scan.levels + 1);
    for (let level = 0; level <= scan.levels; level++) {
      const value = channel.low + (level / scan.levels) * (channel.high - channel.low);
      table[level] = high > low ? (255 * (value - low)) / (high - low) : 0;
    }
    return table;
  };

  /** Share of the target's voxels beyond the end of the scale, of the shown channel; null if it is unknown. */
  viewer.saturated = (data, state, volumes, map, id) => {
    const limit = viewer.limitOf(data, state, map);
    if (!map.mask || !volumes.has(map.mask) || !volumes.has(id) || !(limit > 0)) return null;
    const mask = volumes.get(map.mask), values = volumes.get(id), last = viewer.stepOf(map, limit) + 0.5;
    let inside = 0, beyond = 0;
    for (let i = 0; i < mask.length; i++) {
      if (!mask[i]) continue;
      inside += 1;
      if ((map.signed ? Math.abs(values[i]) : values[i]) > last) beyond += 1;
    }
    return inside ? beyond / inside : null;
  };

  viewer.short = (v) =>
    v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(Number(v.toPrecision(3)));
})();

// Volumes: decode them, cut slices, project.
(() => {
  "use strict";
  const viewer = (globalThis.esegetaViewer ??= {});

  viewer.bytesOf = (text) => Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));

  /** Decode a volume of unsigned numbers: inflate, join low and high bytes, sum differences. */
  async function decode({ deflated, delta, width }) {
    const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"));
    const raw = new Uint8Array(await new Response(stream).arrayBuffer());
    let values = raw;
    if (width === 2) {
      const n = raw.length / 2;
      values = new Uint16Array(n);
      for (let i = 0; i < n; i++) values[i] = raw[i] | (raw[n + i] << 8);
    }
    if (delta) for (let i = 1; i < values.length; i++) values[i] += values[i - 1];
    return values;
  }

  viewer.Volumes = class {
    constructor(data, read) {
      this.data = data;
      this.read = read;
      this.known = new Map();
      this.projections = new Map();
      this.outlines = new Map();
      this.stride = [1, data.size[0], data.size[0] * data.size[1]];
    }

    has(id) { return this.known.has(id); }
    get(id) { return this.known.get(id); }

    /** Load a volume once; maps have signed numbers. */
    async load(id, signed = false) {
      if (!id || this.known.has(id)) return;
      const values = await decode(await this.read(id));
      const Signed = values.BYTES_PER_ELEMENT === 2 ? Int16Array : Int8Array;
      this.known.set(id, signed ? new Signed(values.buffer) : values);
    }

    at(id, position) {
      return this.get(id)[position[0] * this.stride[0] + position[1] * this.stride[1] + position[2] * this.stride[2]];
    }

    /** Offset of every pixel of a slice, row by row from the top, without the offset along `through`. */
    places(plane) {
      if (plane.places) return plane.places;
      const { size } = this.data, [w, h] = [size[plane.across], size[plane.up]];
      const offsets = new Uint32Array(w * h);
      for (let y = 0; y < h; y++)
        for (let x = 0; x < w; x++)
          offsets[y * w + x] = (plane.mirrored ? w - 1 - x : x) * this.stride[plane.across] + (h - 1 - y) * this.stride[plane.up];
      return (plane.places = offsets);
    }

    cut(id, plane, index) {
      const volume = this.get(id), where = this.places(plane), from = index * this.stride[plane.through];
      const out = new volume.constructor(where.length);
      for (let i = 0; i < where.length; i++) out[i] = volume[where[i] + from];
      return out;
    }

    /** Projection along `through`: the value with the highest weight on each line (all, positive, negative). */
    project(id, plane, how) {
      const key = `${id} ${plane.name} ${how}`;
      if (this.projections.has(key)) return this.projections.get(key);
      const weight = { positive: (v) => v, negative: (v) => -v }[how] ?? Math.abs;
      const volume = this.get(id), where = this.places(plane);
      const n = this.data.size[plane.through], step = this.stride[plane.through];
      const out = new volume.constructor(where.length);
      for (let i = 0; i < where.length; i++) {
        let best = -Infinity, value = 0;
        for (let k = 0; k < n; k++) {
          const v = volume[where[i] + k * step], rank = weight(v);
          if (rank > best) { best = rank; value = v; }
        }
        out[i] = value;
      }
      this.projections.set(key, out);
      return out;
    }

    /** Sides of the voxels at the border of a mask, as [x, y, x, y, …] in pixels of the slice; null projects. */
    outline(id, plane, index) {
      const key = `${id} ${plane.name} ${index}`;
      if (this.outlines.has(key)) return this.outlines.get(key);
      if (this.outlines.size > 400) this.outlines.clear();
      const mask = index === null ? this.project(id, plane, "positive") : this.cut(id, plane, index);
      const { size } = this.data, [w, h] = [size[plane.across], size[plane.up]], sides = [];
      for (let i = 0; i < mask.length; i++) {
        if (!mask[i]) continue;
        const x = i % w, y = (i - x) / w;
        if (x === 0 || !mask[i - 1]) sides.push(x, y, x, y + 1);
        if (x === w - 1 || !mask[i + 1]) sides.push(x + 1, y, x + 1, y + 1);
        if (y === 0 || !mask[i - w]) sides.push(x, y, x + 1, y);
        if (y === h - 1 || !mask[i + w]) sides.push(x, y + 1, x + 1, y + 1);
      }
      this.outlines.set(key, sides);
      return sides;
    }
  };
})();

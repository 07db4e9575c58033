// The optional 3D view, drawn by NiiVue if the page contains it.
(() => {
  "use strict";
  const viewer = (globalThis.esegetaViewer ??= {});

  /** Return a volume as a NIfTI-1 file in memory: float32 with the affine of the page. */
  function nifti(data, values) {
    const buffer = new ArrayBuffer(352 + 4 * values.length), view = new DataView(buffer);
    const int16 = (at, v) => view.setInt16(at, v, true), float32 = (at, v) => view.setFloat32(at, v, true);
    view.setInt32(0, 348, true);
    [3, ...data.size, 1, 1, 1, 1].forEach((n, i) => int16(40 + 2 * i, n));
    int16(70, 16);
    int16(72, 32);
    [1, ...data.spacing, 0, 0, 0, 0].forEach((v, i) => float32(76 + 4 * i, v));
    float32(108, 352);
    float32(112, 1);
    view.setUint8(123, 2);
    int16(254, 1);
    data.affine.slice(0, 3).flat().forEach((v, i) => float32(280 + 4 * i, v));
    [0x6e, 0x2b, 0x31, 0].forEach((v, i) => view.setUint8(344 + i, v));
    new Float32Array(buffer, 352).set(values);
    return buffer;
  }

  viewer.draw3d = async (canvas, data, state, volumes, painter, map) => {
    canvas.hidden = false;
    canvas.parentElement.classList.add("drawn"); // NiiVue makes the canvas as large as this
    const three = new globalThis.niivue.Niivue({
      isColorbar: false, show3Dcrosshair: false, isResizeCanvas: true, backColor: [0, 0, 0, 1],
      clipPlaneColor: [0, 0, 0, 0], // transparent, so that the cut surface is visible
    });
    await three.attachToCanvas(canvas);
    const files = [], limit = viewer.limitOf(data, state, map);
    if (data.scan) {
      const grey = viewer.greys(data.scan, data.scan.channels[0], state.window);
      const values = Float32Array.from(volumes.get(data.scan.channels[0].id), (level) => grey[level]);
      files.push({ url: nifti(data, values), name: "scan.nii", colormap: "gray", opacity: 1 });
    }
    const table = Float32Array.from({ length: 2 * map.levels + 1 }, (_, i) => Math.abs(viewer.valueOf(map, i - map.levels)));
    const strength = Float32Array.from(volumes.get(map.volumes[painter.channelOf(map)]), (step) => table[step + map.levels]);
    files.push({ url: nifti(data, strength), name: "map.nii", colormap: "warm", opacity: 0.8, cal_min: 0.3 * limit, cal_max: limit });
    for (const file of files) three.addVolume(await globalThis.niivue.NVImage.loadFromUrl(file));
    three.setSliceType(three.sliceTypeRender);
    if (data.scan) three.setClipPlane([0.2, 270, 0]);
  };
})();

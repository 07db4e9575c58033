// Connects the page with the viewer: volumes are texts of the page. Loads nothing, stores nothing.
(() => {
  "use strict";
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("viewer-data").textContent);

  /** Fit wide tables and the table of maps to the paper, and undo it afterwards. */
  const PAPER = 700; // width of A4 without margins, in CSS pixels
  addEventListener("beforeprint", () => {
    for (const table of document.querySelectorAll("table:not(.grid)")) {
      table.style.width = `${PAPER}px`;
      table.style.zoom = String(Math.min(1, PAPER / Math.max(1, table.scrollWidth)));
    }
    const grid = document.querySelector("table.grid");
    if (grid) grid.style.setProperty("--print-cell", `${Math.floor((PAPER - 90) / (grid.rows[0].cells.length - 1))}px`);
  });
  addEventListener("afterprint", () => {
    for (const table of document.querySelectorAll("table:not(.grid)")) table.style.zoom = table.style.width = "";
  });

  if (!data.maps.length) {
    root.dataset.ready = "no maps";
    return;
  }
  const read = async (id) => {
    const tag = document.getElementById(id), { bytesOf } = globalThis.esegetaViewer;
    const packed = { deflated: bytesOf(tag.textContent), delta: Boolean(tag.dataset.delta), width: Number(tag.dataset.width) };
    tag.remove(); // the text is needed only once
    return packed;
  };
  globalThis.esegetaViewer.mount({ root, data, read });
})();

// Sorts and filters the table of cases. Loads nothing, stores nothing.
(() => {
  "use strict";
  const $ = (id) => document.getElementById(id), table = $("cases"), body = table.tBodies[0], rows = [...body.rows];
  const columns = [...table.tHead.rows[0].cells];

  function filter() {
    const find = $("find").value.trim().toLowerCase(), target = $("of-target")?.value, status = $("of-status").value, kind = $("of-kind").value;
    let shown = 0;
    for (const row of rows) {
      const { dataset } = row;
      row.hidden = Boolean((find && !row.textContent.toLowerCase().includes(find)) || (target && dataset.target !== target)
        || (status && !dataset.status.split(" ").includes(status)) || (kind && !dataset[kind]));
      shown += row.hidden ? 0 : 1;
    }
    $("shown").textContent = `${shown} of ${rows.length} rows`;
  }

  function sort(button) {
    const head = button.closest("th"), index = columns.indexOf(head), down = head.getAttribute("aria-sort") === "ascending";
    for (const column of columns) if (column.hasAttribute("aria-sort")) column.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[index].dataset.value, order = new Intl.Collator(undefined, { numeric: true });
    const compare = (a, b) => order.compare(key(a).replaceAll(",", ""), key(b).replaceAll(",", ""));
    const empty = (row) => ["", "–"].includes(key(row)); // unknown values stay at the end
    const sorted = [...rows].sort((a, b) => empty(a) - empty(b) || (down ? compare(b, a) : compare(a, b)));
    body.append(...sorted);
  }

  for (const button of table.querySelectorAll("button.sort")) button.addEventListener("click", () => sort(button));
  $("filters").addEventListener("input", filter);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
})();

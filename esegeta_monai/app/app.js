// The page of the app: questions, jobs, and the report's viewer. All names are written as text, never as HTML.
(() => {
  "use strict";
  const $ = (id) => document.getElementById(`a-${id}`);
  const QUICK = 10; // seconds that start without a question
  const AXES = ["x", "y", "z"];
  let bundle = null, view = null, shown = null, place = null, box = null, pending = null, timer = 0;
  const jobs = new Map(), costs = new Map(), mine = new Map();

  /** Make an element with text, attributes and children. */
  const make = (tag, text = "", attributes = {}, ...children) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const short = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString());
  const notice = (text) => { $("notice").textContent = text; $("notice").hidden = !text; };

  async function send(path, body = null) {
    const options = body === null ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
    const answer = await fetch(path, options);
    const text = await answer.text();
    let data = null;
    try { data = JSON.parse(text); } catch { /* a refusal is plain text */ }
    if (!answer.ok) throw new Error(data?.error ?? text ?? `status ${answer.status}`);
    return data;
  }

  /** Run a handler, and show its error. */
  const guarded = (work) => (...args) => Promise.resolve(work(...args)).catch((error) => notice(error.message));

  // ---- the bundle ------------------------------------------------------------------------------------------------

  function fill(select, entries, chosen = null) {
    select.replaceChildren(...entries.map(([value, text]) => make("option", text, { value })));
    if (chosen !== null) select.value = String(chosen);
  }

  function open(state) {
    bundle = state.bundle;
    const names = Object.entries(bundle.classes);
    $("bundle").textContent = [bundle.bundle, bundle.version].filter(Boolean).join(" ");
    $("bundle").title = `on ${bundle.device}`;
    fill($("case"), bundle.cases.map((name, i) => [i, name]));
    fill($("class"), names.map(([i, name]) => [i, `${name} (${i})`]));
    fill($("against"), [["", "(no other class)"], ...names.map(([i, name]) => [i, `${name} (${i})`])]);
    fill($("method"), bundle.methods.map((m) => [m.name, m.name]), "InputXGradient");
    fill($("target"), bundle.targets.map((t) => [t.name, t.name]), "PredictedClasses");
    fill($("metrics"), bundle.metrics.map((m) => [m.name, `${m.name} (${m.group})`]));
    describe("method", bundle.methods);
    describe("target", bundle.targets);
    for (const job of state.jobs) update(job);
  }

  /** Write the summary and the form of a method or target. */
  function describe(kind, entries) {
    const entry = entries.find((e) => e.name === $(kind).value);
    $(`${kind}-text`).textContent = entry.summary.replaceAll("`", "");
    const fields = [...entry.required.map((name) => [name, undefined]), ...Object.entries(entry.parameters)].map(([name, value]) => {
      let field;
      if (typeof value === "boolean") {
        field = make("select", "", {}, ...["true", "false"].map((v) => make("option", v, { value: v })));
        field.value = String(value);
      } else field = make("input", "", { placeholder: value === undefined ? "needed" : JSON.stringify(value) });
      field.dataset.parameter = name;
      field.dataset.default = value === undefined ? "" : JSON.stringify(value);
      return make("label", "", {}, make("span", name), field);
    });
    if (!fields.length) fields.push(make("p", "It has none.", { class: "small" }));
    $(`${kind}-parameters`).replaceChildren(...fields);
  }

  /** Return what was typed into a form: JSON where it is JSON, else text; defaults are left out. */
  function parameters(kind) {
    const values = {};
    for (const field of $(`${kind}-parameters`).querySelectorAll("[data-parameter]")) {
      const text = field.value.trim();
      if (text === "" || text === field.dataset.default) continue;
      try { values[field.dataset.parameter] = JSON.parse(text); } catch { values[field.dataset.parameter] = text; }
    }
    return values;
  }

  // ---- a case ----------------------------------------------------------------------------------------------------

  /** Load a case or its new maps; keep place, zoom, planes and the second map of the same case. */
  async function load({ show = null, newest = null } = {}) {
    const number = Number($("case").value), same = view !== null && view.number === number;
    const kept = same && shown ? (({ at, centre, zoom, plane, show, look, drag }) => ({ at, centre, zoom, plane, show, look, drag }))(shown.state) : null;
    const named = (map) => JSON.stringify([map.method, map.target]), compared = same && shown?.second ? named(shown.second) : null;
    $("loading").hidden = false;
    $("loading").textContent = same ? "The maps are being read." : "The case is being read and predicted.";
    const made = await send(`/api/cases/${number}/view`, { show, newest });
    view = { ...made, number };
    const root = make("div"); // a new one, because the former viewer still listens to changes of its own
    root.innerHTML = made.html; // written by this server; all names in it are escaped
    $("viewer").replaceChildren(root);
    const read = async (id) => {
      const answer = await fetch(`/api/views/${made.view}/${id}`);
      if (!answer.ok) throw new Error(`volume ${id}: ${await answer.text()}`);
      const deflated = new Uint8Array(await answer.arrayBuffer());
      return { deflated, delta: answer.headers.get("x-delta") === "1", width: Number(answer.headers.get("x-width")) };
    };
    shown = globalThis.esegetaViewer.mount({ root, data: made.data, read });
    if (kept) {
      Object.assign(shown.state, kept, { moved: true });
      for (const name of ["plane", "show", "look", "drag"]) {
        const control = root.querySelector(`input[name="${name}"][value="${kept[name]}"]`);
        if (control) control.checked = true;
      }
      const second = made.data.maps.findIndex((map) => named(map) === compared); // the new map takes the first place only
      if (second >= 0 && second !== shown.state.selected) { shown.state.second = second; root.querySelector("#second").value = String(second); }
      shown.schedule();
    } else { place = null; box = null; writeBox(); }
    follow(root);
    $("loading").hidden = true;
    $("case-text").textContent = made.has_map ? `${made.windows} windows; the network's output is read as ${made.head}.` : `The network gives one answer for the whole image; its output is read as ${made.head}.`;
    for (const radio of document.querySelectorAll('input[name="kind"]')) radio.disabled = !made.has_map && ["voxel", "component"].includes(radio.value);
    if (!made.has_map) document.querySelector('input[name="kind"][value="class"]').checked = true;
    if (!same) { if (made.has_map) writeScores([]); else writeScores(made.scores); look(); }
    listResults();
    network.loaded(same);
    $("viewer").dataset.count = String((Number($("viewer").dataset.count) || 0) + 1);
  }

  function listResults() {
    const in_view = new Set(view.data.maps.map((m) => m.number));
    $("results").replaceChildren(...view.results.map((r) => {
      const tick = make("input", "", { type: "checkbox", "aria-label": `show ${r.method}, ${r.target}` });
      tick.checked = in_view.has(r.number);
      tick.dataset.number = String(r.number);
      const row = make("tr", "", {}, make("td", "", {}, tick), make("td", r.target ?? "–"), make("td", r.method ?? "–"), make("td", r.reason ? `${r.status}: ${r.reason}` : r.status), make("td", short(r.seconds), { class: "n" }));
      return row;
    }));
    $("results-box").hidden = !view.results.length;
  }

  /** Let the panel follow the cross-hair, and draw the box over the pictures. */
  function follow(root) {
    const [go, look_at, render] = [shown.go, shown.look, shown.render].map((f) => f.bind(shown));
    shown.go = (axis, index) => { go(axis, index); moved(); };
    shown.look = (at) => { look_at(at); moved(); };
    shown.render = () => { render(); drawBox(); };
    for (const canvas of root.querySelectorAll("canvas.big")) {
      canvas.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); $("form").requestSubmit(); } });
      canvas.addEventListener("click", () => { if ($("at-once").checked && !drawing()) { moved(0); pending = true; } });
      canvas.addEventListener("pointerdown", (event) => startBox(event, canvas), { capture: true });
    }
    drawBox();
  }

  function moved(wait = 250) {
    clearTimeout(timer);
    timer = setTimeout(guarded(look), wait);
  }

  /** Ask what the network says at the cross-hair. */
  async function look() {
    const voxel = [...shown.state.at], asked = view.view;
    if ([...jobs.values()].some((job) => job.state === "running")) $("place").textContent = "The worker is busy; this place is looked at afterwards.";
    const answer = await send("/api/look", { view: asked, voxel });
    if (asked !== view.view) return;
    place = { voxel, world: answer.world, index: answer.voxel };
    network.moved();
    $("place").textContent = `voxel ${voxel.join(", ")} · ${answer.world.map((v) => v.toFixed(1)).join(", ")} mm`;
    writeScores(answer.scores);
    if (pending) { pending = null; await explain(); }
  }

  function writeScores(scores) {
    $("scores").replaceChildren(...scores.slice(0, 5).map((s) => make("li", "", {}, make("span", s.name), make("span", s.probability === null ? short(s.output) : `${(100 * s.probability).toFixed(1)} %`, { class: "n" }))));
    if (scores.length) $("class").value = String(scores[0].class);
  }

  // ---- questions -------------------------------------------------------------------------------------------------

  function question() {
    const kind = document.querySelector('input[name="kind"]:checked').value, body = { case: view.number, view: view.view };
    const against = $("against").value === "" ? null : Number($("against").value);
    if (kind === "other") body.target = { kind, name: $("target").value, parameters: parameters("target") };
    else if (kind === "class") body.target = { kind, class: Number($("class").value), against, name: view.has_map ? "MultiClassMask" : "ClassScore" };
    else body.target = { kind, class: Number($("class").value), against, voxel: [...shown.state.at] };
    body.methods = [{ name: $("method").value, parameters: parameters("method") }];
    const limit = Number($("limit").value);
    body.time_limit = limit > 0 ? limit : null;
    body.costly = $("costly").checked;
    const name = kind === "other" ? body.target.name : $("class").selectedOptions[0]?.textContent;
    const where = kind === "voxel" || kind === "component" ? ` at ${shown.state.at.join(", ")}` : "";
    const other = against === null || kind === "other" ? "" : `, not ${$("against").selectedOptions[0].textContent}`;
    body.title = `${$("method").value}: why ${name}${other} (${kind}${where})`;
    return body;
  }

  const costKey = (body) => JSON.stringify([body.case, body.methods, body.target?.kind, body.box ?? null]);

  async function cost(body) {
    $("costs").textContent = "The cost is being estimated.";
    const { costs: list } = await send("/api/costs", body);
    const unknown = list.some((c) => c.seconds === null && !c.note), seconds = unknown ? Infinity : list.reduce((sum, c) => sum + (c.seconds ?? 0), 0), problem = list.map((c) => c.note).find(Boolean) ?? null;
    const known = { seconds, problem, text: problem ?? `${unknown ? "An unknown time" : `About ${seconds < 1 ? "1 s or less" : `${seconds < 10 ? short(Number(seconds.toPrecision(2))) : Math.round(seconds)} s`}`}: ${list.reduce((n, c) => n + c.passes, 0)} window passes, ${short(Math.max(...list.map((c) => c.peak_memory_bytes ?? 0)) / 2 ** 30)} GiB.` };
    costs.set(costKey(body), known);
    $("costs").textContent = known.text;
    return known;
  }

  /** Show the cost, then start; what takes long is started by a second button. */
  async function explain(body = { ...question(), do: "explain" }) {
    const known = costs.get(costKey(body)) ?? (await cost(body));
    $("costs").textContent = known.text;
    if (known.problem === null && known.seconds > QUICK) {
      $("confirm").hidden = false;
      $("start").onclick = guarded(() => { $("confirm").hidden = true; return submit(body); });
      $("start").focus();
      return;
    }
    await submit(body);
  }

  async function submit(body) {
    notice("");
    const job = await send("/api/jobs", body);
    mine.set(job.id, body);
    update(job);
  }

  // ---- a box -----------------------------------------------------------------------------------------------------

  const drawing = () => $("draw").getAttribute("aria-pressed") === "true";

  function startBox(event, canvas) {
    if (!drawing() || event.button !== 0) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    const plane = shown.planeOf(canvas), { size } = view.data;
    const at = (e) => shown.under(e, canvas, plane).map(Math.floor);
    const first = at(event), depth = Math.max(1, Number($("depth").value) || 1);
    canvas.setPointerCapture(event.pointerId);
    const move = (e) => {
      const now = at(e), low = [0, 0, 0], high = [0, 0, 0], middle = shown.state.at[plane.through];
      [plane.across, plane.up].forEach((axis, i) => { low[axis] = Math.min(first[i], now[i]); high[axis] = Math.max(first[i], now[i]); });
      low[plane.through] = middle - Math.floor((depth - 1) / 2);
      high[plane.through] = low[plane.through] + depth - 1;
      box = { low: low.map((v, a) => Math.max(0, Math.min(size[a] - 1, v))), high: high.map((v, a) => Math.max(0, Math.min(size[a] - 1, v))) };
      writeBox();
    };
    const end = (e) => {
      move(e);
      canvas.removeEventListener("pointermove", move, true);
      canvas.removeEventListener("pointerup", end, true);
      $("draw").setAttribute("aria-pressed", "false");
    };
    canvas.addEventListener("pointermove", move, true);
    canvas.addEventListener("pointerup", end, true);
    move(event);
  }

  function writeBox() {
    AXES.forEach((axis, a) => { $(`low-${axis}`).value = box ? box.low[a] : ""; $(`high-${axis}`).value = box ? box.high[a] : ""; });
    drawBox();
  }

  function readBox() {
    const number = (side, axis) => $(`${side}-${axis}`).value === "" ? NaN : Math.round(Number($(`${side}-${axis}`).value));
    const [low, high] = ["low", "high"].map((side) => AXES.map((axis) => number(side, axis)));
    box = [...low, ...high].every(Number.isFinite) ? { low: low.map((v, a) => Math.min(v, high[a])), high: high.map((v, a) => Math.max(v, low[a])) } : null;
    drawBox();
  }

  function drawBox() {
    if (!shown) return;
    for (const canvas of $("viewer").querySelectorAll("canvas.big")) {
      const frame = canvas.parentElement;
      frame.querySelector(".box-drawn")?.remove();
      if (!box) continue;
      const plane = shown.planeOf(canvas), { size } = view.data, at = shown.state.at[plane.through];
      if (shown.state.show !== "slice" || at < box.low[plane.through] || at > box.high[plane.through]) continue;
      const [x, y, w, h] = globalThis.esegetaViewer.boxOf(shown.state, size, plane, [0, 0, canvas.clientWidth, canvas.clientHeight]);
      const a0 = plane.mirrored ? size[plane.across] - 1 - box.high[plane.across] : box.low[plane.across];
      const b0 = size[plane.up] - 1 - box.high[plane.up];
      const wide = box.high[plane.across] - box.low[plane.across] + 1, high = box.high[plane.up] - box.low[plane.up] + 1;
      const drawn = make("div", "", { class: "box-drawn" });
      Object.assign(drawn.style, {
        left: `${canvas.offsetLeft + x + (a0 / size[plane.across]) * w}px`, top: `${canvas.offsetTop + y + (b0 / size[plane.up]) * h}px`,
        width: `${(wide / size[plane.across]) * w}px`, height: `${(high / size[plane.up]) * h}px`,
      });
      frame.append(drawn);
    }
  }

  async function occlude() {
    readBox();
    if (!box) { $("change").textContent = "Draw a box first, or type its corners."; return; }
    $("change").textContent = "The score is being computed.";
    const body = { ...question(), methods: [], box: [box.low, box.high], baseline: $("baseline").value, do: "explain" };
    body.title = `Without a box: ${body.title.split(": ").slice(1).join(": ")}`;
    await submit(body);
  }

  // ---- the network -----------------------------------------------------------------------------------------------

  const network = globalThis.esegetaNetwork({
    make, short, send, guarded, question,
    view: () => view, shown: () => shown,
    /** Explain with another method or target than the form's. */
    explain: (changes, title) => explain({ ...question(), do: "explain", ...changes, title }),
    /** The voxel of the network's grid at the cross-hair. */
    index: async () => { if (!place || place.voxel.some((v, i) => v !== shown.state.at[i])) await look(); return place.index; },
  });

  // ---- jobs ------------------------------------------------------------------------------------------------------

  function update(job) {
    const before = jobs.get(job.id);
    jobs.set(job.id, job);
    $("no-jobs").hidden = true;
    let row = document.querySelector(`[data-job="${job.id}"]`);
    if (!row) {
      row = make("li", "", { "data-job": job.id });
      $("job-list").prepend(row);
    }
    row.dataset.state = job.state;
    const head = make("div", "", { class: "head" }, make("span", job.title, { class: "title" }));
    if (job.state === "running" || job.state === "waiting") {
      const bar = make("progress", "", { "aria-label": `progress of ${job.title}`, max: job.total || 1 });
      if (job.state === "running" && job.total) bar.value = Math.min(job.done, job.total);
      const stop = make("button", "Cancel", { type: "button" });
      stop.addEventListener("click", guarded(() => send(`/api/jobs/${job.id}/cancel`, {})));
      head.append(bar, make("span", job.state === "running" ? `${job.now} ${job.done}${job.total ? ` of ${job.total}` : ""} passes` : "", { class: "small" }), stop);
    } else head.append(make("span", job.started ? `${(job.ended - job.started).toFixed(1)} s` : "", { class: "small" }));
    head.append(make("span", job.state, { class: `state ${job.state}` }));
    const parts = [head];
    if (job.error) parts.push(make("p", job.error, { class: "small" }));
    const result = job.result;
    for (const r of result?.results ?? []) if (r.reason) parts.push(make("p", `${r.target ?? ""} ${r.method ?? ""}: ${r.status}: ${r.reason}`, { class: "small" }));
    if (result?.box) parts.push(make("p", changeText(result.box)));
    if (result?.exit_code !== undefined) parts.push(make("p", `The metrics are in the report and in metrics.csv${result.exit_code ? "; some could not be computed" : ""}: press "Write the report".`, { class: "small" }));
    if (result?.command) parts.push(equivalent(result));
    row.replaceChildren(...parts);
    if (mine.has(job.id)) $("progress").textContent = progressText(job);
    if (job.state === "done" && before && before.state !== "done") guarded(finished)(job);
    if (job.state === "failed" && before && before.state !== "failed" && mine.get(job.id)?.box) $("change").textContent = job.error;
  }

  /** What becomes of the newest question, beside its button: the list of jobs is further down. */
  function progressText(job) {
    if (job.id !== Math.max(...mine.keys())) return $("progress").textContent;
    const of = job.total ? `${job.done} of ${job.total} passes` : "";
    return { waiting: "Waiting for the job before it.", running: `Running ${of}; it can be cancelled under Jobs.`, done: `Done in ${(job.ended - job.started).toFixed(1)} s.`, failed: `Failed: ${job.error}`, cancelled: "Cancelled." }[job.state];
  }

  const changeText = ({ before, after, change }) => `Score ${short(before)} → ${short(after)}: ${change > 0 ? "+" : ""}${short(change)} (${before ? `${(100 * change / Math.abs(before)).toFixed(1)} %` : "–"})`;

  function equivalent(result) {
    const copy = (text) => {
      const button = make("button", "Copy", { type: "button" });
      button.addEventListener("click", guarded(async () => { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }));
      return button;
    };
    return make("details", "", {}, make("summary", "The same as a command, and in Python"), make("pre", result.command, { tabindex: "0" }), copy(result.command), make("pre", result.python, { tabindex: "0" }), copy(result.python));
  }

  async function finished(job) {
    const result = job.result;
    if (result.box) $("change").textContent = changeText(result.box);
    if (result.results && view && result.case === view.number) {
      const last = result.results.find((r) => r.map) ?? null;
      await load({ newest: last ? [last.target, last.method] : null });
    }
    if (result.pages) $("pages").replaceChildren(...Object.entries(result.pages).map(([name, id]) => make("li", "", {}, make("a", `Report of ${name}`, { href: `/files/${id}`, target: "_blank", rel: "noopener" }))));
  }

  function listen() {
    const events = new EventSource("/api/events");
    events.onmessage = ({ data }) => {
      const event = JSON.parse(data);
      if (event.event === "job") update(event.job);
      else if (event.event === "restarted") notice(event.text || "The worker was started again; finished maps are kept.");
      else if (event.event === "worker" && event.problem) notice(event.problem);
    };
    events.onerror = () => { if (events.readyState === EventSource.CLOSED) notice("The app has ended: start esegeta-monai app again, and open its new address."); };
  }

  // ---- controls --------------------------------------------------------------------------------------------------

  $("form").addEventListener("submit", (event) => { event.preventDefault(); guarded(() => explain())(); });
  $("cost").addEventListener("click", guarded(() => cost({ ...question(), do: "explain" })));
  $("do-not").addEventListener("click", () => { $("confirm").hidden = true; });
  $("case").addEventListener("change", guarded(() => load()));
  $("method").addEventListener("change", () => describe("method", bundle.methods));
  $("target").addEventListener("change", () => describe("target", bundle.targets));
  for (const radio of document.querySelectorAll('input[name="kind"]'))
    radio.addEventListener("change", () => { $("of-class").hidden = radio.value === "other"; $("of-target").hidden = radio.value !== "other"; });
  $("draw").addEventListener("click", () => $("draw").setAttribute("aria-pressed", String(!drawing())));
  for (const side of ["low", "high"]) for (const axis of AXES) $(`${side}-${axis}`).addEventListener("change", readBox);
  $("occlude").addEventListener("click", guarded(occlude));
  $("show").addEventListener("click", guarded(() => load({ show: [...$("results").querySelectorAll("input:checked")].map((t) => Number(t.dataset.number)) })));
  $("evaluate").addEventListener("click", guarded(() => {
    const metrics = [...$("metrics").selectedOptions].map((o) => ({ name: o.value }));
    const body = { ...question(), do: "evaluate", metrics };
    body.title = `Evaluate ${body.title}`;
    return submit(body);
  }));
  $("report").addEventListener("click", guarded(() => submit({ do: "report" })));

  guarded(async () => {
    open(await send("/api/state"));
    listen();
    await load();
  })();
})();

// The network in 3D: its layers as boxes, the channels of a layer as slices, and questions about a channel or a unit.
"use strict";
globalThis.esegetaNetwork = ({ make, short, send, guarded, question, view, shown, explain, index }) => {
  const $ = (id) => document.getElementById(`a-${id}`);
  let layers = [], chosen = null, channel = null, asked = 0;

  const time = (seconds) => (seconds < 1e-3 ? `${(1e6 * seconds).toFixed(0)} µs` : `${(1e3 * seconds).toFixed(seconds < 0.1 ? 1 : 0)} ms`);
  const sizes = (layer) => layer.shape.join(" × ");

  async function list() {
    $("layers-text").textContent = "The network runs on one window.";
    const answer = await send("/api/layers", { case: view().number });
    layers = answer.layers.map((layer, number) => ({ ...layer, number }));
    const total = layers.reduce((sum, layer) => sum + layer.seconds, 0);
    $("layers-text").textContent = `${layers.filter((l) => l.main).length} of ${layers.length} modules are shown; a window of ${answer.window.join(" × ")} takes ${time(total)} on ${answer.device}.`;
    $("layers").textContent = "Measure again";
    draw(total);
  }

  /** Draw the layers: buttons, so that the keyboard and screen readers reach them. */
  function draw(total) {
    const all = $("all-layers").checked, most = Math.max(...layers.map((l) => l.seconds)), widest = Math.max(...layers.filter((l) => l.has_map).map((l) => l.shape[1]), 1);
    $("layer-list").replaceChildren(...layers.filter((l) => all || l.main).map((layer) => {
      const edge = layer.has_map ? 14 + 62 * Math.sqrt(layer.shape[1] / widest) : 14;
      const box = make("span", "", { class: "box3", "aria-hidden": "true" }, ...["front", "side", "top"].map((face) => make("span", "", { class: `face ${face}` })));
      box.style.setProperty("--w", `${6 + 7 * Math.log2(1 + layer.shape[0])}px`);
      box.style.setProperty("--h", `${edge}px`);
      const meter = make("span", "", { class: "spent", "aria-hidden": "true" });
      meter.style.setProperty("--share", String(layer.seconds / most));
      const button = make("button", "", { type: "button", class: "layer", "data-layer": layer.number, "aria-pressed": String(layer === chosen) },
        make("span", "", { class: "stage" }, box), make("span", layer.type, { class: "type" }), make("span", layer.name, { class: "small dotted" }),
        make("span", layer.shape.join("×"), { class: "small" }), meter, make("span", `${time(layer.seconds)}${layer.calls > 1 ? `, ${layer.calls} calls` : ""}`, { class: "small" }));
      button.title = `${layer.name}: ${layer.parameters} parameters, ${(100 * layer.seconds / total).toFixed(1)} % of the time`;
      button.addEventListener("click", guarded(() => choose(layer)));
      return make("li", "", {}, button);
    }));
  }

  async function choose(layer) {
    chosen = layer;
    channel = null;
    for (const button of $("layer-list").querySelectorAll("button")) button.setAttribute("aria-pressed", String(Number(button.dataset.layer) === layer.number));
    $("layer").hidden = false;
    $("layer-name").textContent = `${layer.name} (${layer.type})`;
    $("layer-text").textContent = `Output ${sizes(layer)}; ${layer.parameters} parameters of its own; ${time(layer.seconds)} for a window.`;
    const { planes } = view().data;
    $("plane").replaceChildren(...planes.map((p, i) => make("option", p.name, { value: i })));
    $("plane").closest("label").hidden = planes.length < 2;
    await channels();
  }

  async function channels() {
    if (!chosen) return;
    const mine = ++asked, order = document.querySelector('input[name="order"]:checked').value;
    $("channels-text").textContent = order === "relevance" ? "The relevance of the channels is being computed; this can be cancelled under Jobs." : "The layer is being read.";
    $("channel").hidden = true;
    const body = { ...question(), voxel: [...shown().state.at], layer: chosen.number, plane: Number($("plane").value) || 0, order };
    let answer;
    try {
      answer = await send("/api/channels", body);
    } catch (error) {
      if (mine === asked) { $("channels-text").textContent = error.message; $("channels").replaceChildren(); }
      return;
    }
    if (mine !== asked) return;
    const by = order === "relevance" ? "share of the relevance to the question" : "mean absolute activation in the window";
    $("channels-text").textContent = `${answer.channels.length} of ${answer.total} channels at the cross-hair, by their ${by}. Each picture goes from its lowest value (black) to its highest (white).`;
    $("channels").replaceChildren(...answer.channels.map((entry) => {
      const value = entry.share === null ? short(entry.activation) : `${(100 * entry.share).toFixed(1)} %`;
      const button = make("button", "", { type: "button", class: "channel", "data-channel": entry.channel, "aria-pressed": "false" });
      if (entry.grey) button.append(picture(entry, answer));
      else button.append(make("span", short(entry.value), { class: "value" }));
      button.append(make("span", `channel ${entry.channel}`, { class: "small" }), make("span", value, { class: "small" }));
      if (entry.grey) button.title = `from ${short(entry.low)} to ${short(entry.high)}`;
      button.addEventListener("click", () => pick(entry.channel));
      return button;
    }));
    $("channels").dataset.order = order;
    $("channels").dataset.layer = chosen.name;
    $("by-unit").hidden = !answer.at;
    if (channel !== null) pick(channel);
  }

  function picture({ grey, channel: number }, { width, height, at }) {
    const canvas = make("canvas", "", { width, height, role: "img", "aria-label": `slice of channel ${number}` });
    const context = canvas.getContext("2d"), image = context.createImageData(width, height), bytes = atob(grey);
    for (let i = 0; i < bytes.length; i++) image.data.set([bytes.charCodeAt(i), bytes.charCodeAt(i), bytes.charCodeAt(i), 255], 4 * i);
    context.putImageData(image, 0, 0);
    const frame = make("span", "", { class: "frame" }, canvas), mark = make("span", "", { class: "at" });
    Object.assign(mark.style, { left: `${(100 * at[1]) / width}%`, top: `${(100 * at[0]) / height}%`, width: `${100 / width}%`, height: `${100 / height}%` });
    frame.append(mark);
    return frame;
  }

  function pick(number) {
    channel = number;
    for (const button of $("channels").querySelectorAll("button")) button.setAttribute("aria-pressed", String(Number(button.dataset.channel) === number));
    $("channel").hidden = false;
    $("channel-name").textContent = `Channel ${number} of ${chosen.name}`;
  }

  async function byChannel() {
    const name = $("through").value, key = name === "ConceptRelevance" ? "channels" : "channel";
    const method = { name, parameters: { layer: chosen.name, [key]: channel, name: `${name}-channel ${channel} of ${chosen.name}` } };
    await explain({ methods: [method] }, `${question().title.split(": ").slice(1).join(": ")}, through channel ${channel} of ${chosen.name}`);
  }

  async function byUnit() {
    const at = await index(), name = `LayerNeuron-channel ${channel} of ${chosen.name} at ${at.join(" ")}`;
    const target = { kind: "other", name: "LayerNeuron", parameters: { layer: chosen.name, channel, index: at, name } };
    await explain({ target }, `${question().methods[0].name}: why unit of channel ${channel} of ${chosen.name} at ${shown().state.at.join(", ")}`);
  }

  $("layers").addEventListener("click", guarded(list));
  $("all-layers").addEventListener("change", () => layers.length && draw(layers.reduce((sum, l) => sum + l.seconds, 0)));
  $("turn").addEventListener("input", () => $("layer-list").style.setProperty("--turn", `${$("turn").value}deg`));
  $("plane").addEventListener("change", guarded(channels));
  for (const radio of document.querySelectorAll('input[name="order"]')) radio.addEventListener("change", guarded(channels));
  $("by-channel").addEventListener("click", guarded(byChannel));
  $("by-unit").addEventListener("click", guarded(byUnit));

  return {
    /** The cross-hair has moved: the slices follow; relevance does not, because it takes longer than a look. */
    moved() {
      if (chosen && document.querySelector('input[name="order"]:checked').value === "activation") guarded(channels)();
    },
    /** A case was loaded; another one has channels of its own. */
    loaded(same) { if (!same && chosen) guarded(channels)(); },
  };
};

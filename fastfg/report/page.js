"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PER_SIDE = 5, PER_PAGE = 12, HEAT = 0.6, DIFFERENCE = 0.8;
  const $ = (id) => document.getElementById(id);
  const minus = (text) => text.replace(/-/g, "−");
  const num = (v, signed) => v === null || v === undefined ? "missing"
    : minus((signed && v > 0 ? "+" : "") + (v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e5) ? v.toExponential(2) : String(+v.toPrecision(4))));

  const apart = (text) => `\u2068${text}\u2069`;  // letters that run from right to left do not turn the words around them

  function el(tag, attributes, ...children) {
    const svg = ["svg", "rect", "line", "circle", "text"].includes(tag);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  }

  // Numbers -----------------------------------------------------------------------------------------------------------

  function bytes(text) {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }
  const array = (Type, text) => new Type(bytes(text).buffer);
  const colours = Object.fromEntries(Object.entries(data.colours).map(([name, text]) => [name, bytes(text)]));
  const place = new Map(data.variants.map((v, i) => [v.name, i]));

  function map(image, variant) {  // between 0 and 1, per patch
    const stored = image.maps[place.get(variant)];
    if (!stored) return null;
    return stored.decoded ||= Float64Array.from(array(Uint16Array, stored.values), (v) => v / 65535);
  }
  function difference(image) {
    const a = map(image, state.left), b = map(image, state.right);
    return a && b ? b.map((v, i) => v - a[i]) : null;
  }
  function largestDifference() {
    let most = 0;
    for (const image of data.images) for (const v of difference(image) || []) most = Math.max(most, Math.abs(v));
    return most;
  }
  const score = (i, variant, metric) => place.has(variant) ? data.scores[i][place.get(variant)][metric] : null;
  function gain(i, metric) {
    const a = score(i, state.left, metric), b = score(i, state.right, metric);
    return a === null || b === null ? null : b - a;
  }

  // Pictures ----------------------------------------------------------------------------------------------------------

  function upsampled(values, [gh, gw], height, width, blocks) {  // bilinear, as the maps of fastfg are, or in blocks
    const out = new Float32Array(height * width);
    const axis = (n, size) => Array.from({ length: size }, (_, i) => {
      const at = Math.min(Math.max((i + 0.5) * n / size - 0.5, 0), n - 1), low = Math.floor(at);
      return blocks ? [Math.floor((i + 0.5) * n / size), 0, 0] : [low, Math.min(low + 1, n - 1), at - low];
    });
    const xs = axis(gw, width);
    axis(gh, height).forEach(([y0, y1, fy], y) => xs.forEach(([x0, x1, fx], x) => {
      const top = values[y0 * gw + x0] * (1 - fx) + values[y0 * gw + x1] * fx;
      const low = values[y1 * gw + x0] * (1 - fx) + values[y1 * gw + x1] * fx;
      out[y * width + x] = top * (1 - fy) + low * fy;
    }));
    return out;
  }
  function loaded(image) {
    return image.loading ||= new Promise((done, failed) => {
      const picture = new Image();
      picture.onload = () => done(picture);
      picture.onerror = failed;
      picture.src = image.picture;
    });
  }
  async function paint(canvas, image, values, kind, blocks) {  // kind: heat (0 to 1) or difference (-1 to 1)
    const picture = await loaded(image);
    const width = canvas.width = picture.naturalWidth, height = canvas.height = picture.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    if (!values) return;
    const pixels = context.getImageData(0, 0, width, height), p = pixels.data, table = colours[kind];
    const large = upsampled(values, image.grid, height, width, blocks);
    for (let i = 0; i < large.length; i++) {
      const v = kind === "heat" ? large[i] : (large[i] + 1) / 2;
      const c = 3 * Math.min(255, Math.max(0, Math.round(v * 255)));
      const weight = kind === "heat" ? HEAT * Math.min(1, large[i]) : DIFFERENCE;
      const grey = (p[4 * i] + p[4 * i + 1] + p[4 * i + 2]) / 3;
      for (let k = 0; k < 3; k++) {
        const under = kind === "heat" ? p[4 * i + k] : grey;
        p[4 * i + k] = (1 - weight) * under + weight * table[c + k];
      }
    }
    context.putImageData(pixels, 0, 0);
  }
  const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (!entry.isIntersecting) return;
    seen.unobserve(entry.target);
    entry.target.paint();
  }), { rootMargin: "400px" });

  // The gallery -------------------------------------------------------------------------------------------------------

  const named = new Set(data.images.flatMap((image) => image.maps.map((m, v) => m && data.variants[v].name).filter(Boolean)));
  const choices = data.variants.map((v) => v.name).filter((name) => named.has(name));
  const others = data.variants.filter((v) => ["control", "seed"].includes(v.role) && named.has(v.name)).map((v) => v.name);
  const seeds = new Set(data.variants.filter((v) => v.role === "seed").map((v) => v.name));  // may be judged on fewer images
  const pair = data.pair.length ? data.pair : [choices[0], choices[1] || choices[0]];
  const state = { left: pair[0], right: pair[1], by: choices.length < 2 ? "0/0" : "gain/0", view: "both", kind: "", error: "", controls: others.length <= 3, shown: PER_PAGE };
  const classOf = (image) => image.label ?? image.predicted ?? image.explained;
  const classes = [...new Set(data.images.map(classOf).filter((c) => c !== null && c !== undefined))].sort();
  const judged = data.images.some((image) => image.label !== null && image.predicted !== null);

  function value(i) {  // what images are ordered by; higher is better
    const [of, metric] = state.by.split("/");
    if (!data.metrics.length) return null;
    const found = of === "gain" ? gain(i, +metric) : score(i, data.variants[+of].name, +metric);
    return found === null ? null : data.metrics[metric].higher === false ? -found : found;
  }
  function kept() {
    return data.images.map((_, i) => i).filter((i) => {
      const image = data.images[i], wrong = image.label !== image.predicted;
      if (state.kind && classOf(image) !== state.kind) return false;
      if (state.error === "missing") return data.scores[i].some((one, v) => !seeds.has(data.variants[v].name) && one.some((s) => s === null));
      return !state.error || (image.label !== null && image.predicted !== null && wrong === (state.error === "wrong"));
    });
  }
  function ordered() {
    const found = kept(), without = found.filter((i) => value(i) === null);
    const best = found.filter((i) => value(i) !== null).sort((a, b) => value(b) - value(a) || a - b);
    if (state.view === "worst") best.reverse();
    return [...best, ...without];
  }

  function choice(label, name, options) {
    const entry = ([v, text]) => el("option", { value: v, selected: String(state[name]) === String(v) }, text);
    const select = el("select", { onchange: () => { state[name] = select.value; state.shown = PER_PAGE; show(name); } },
      options.map((o) => Array.isArray(o[1]) ? el("optgroup", { label: o[0] }, o[1].map(entry)) : entry(o)));
    return el("label", {}, label, select);
  }
  function controls() {
    const metrics = data.metrics.map((m, i) => [i, m.title]);
    const orders = metrics.length ? [...(choices.length < 2 ? [] : [["Change", metrics.map(([i, title]) => [`gain/${i}`, `Change in ${title}`])]]),
      ...data.variants.map(({ name }, v) => [name, metrics.map(([i, title]) => [`${v}/${i}`, `${name}: ${title}`])])] : [];
    const variants = choices.map((name) => [name, name]);
    const box = el("input", { type: "checkbox", checked: state.controls, onchange: () => { state.controls = box.checked; show("controls"); } });
    $("controls").replaceChildren(...[
      orders.length ? choice("Order by", "by", orders) : null,
      orders.length ? choice("Show", "view", [["both", "Both ends"], ["best", "All, best first"], ["worst", "All, worst first"]]) : null,
      choices.length > 1 ? choice("Compare", "left", variants) : null,
      choices.length > 1 ? choice("with", "right", variants) : null,
      classes.length > 1 ? choice("Class", "kind", [["", "All"], ...classes.map((c) => [c, c])]) : null,
      choice("Errors", "error", [["", "All images"], ...(judged ? [["wrong", "Classified wrong"], ["right", "Classified right"]] : []), ["missing", "A score is missing"]]),
      others.length ? el("label", { class: "check" }, box, "Show the controls") : null,
    ].filter(Boolean));
  }
  function bar(title, kind, ends) {
    const stops = Array.from({ length: 17 }, (_, i) => { const c = 3 * Math.round(i * 255 / 16); return `rgb(${colours[kind].slice(c, c + 3).join(" ")})`; });
    const strip = el("div", { class: "strip", "aria-hidden": "true" });
    strip.style.background = `linear-gradient(to right, ${stops.join(",")})`;
    return el("div", { class: "bar" }, title, strip, el("div", { class: "ends" }, ends.map((text) => el("span", {}, text))));
  }

  let most = 0;
  function show(changed) {
    if (!changed || changed === "left" || changed === "right") most = largestDifference();
    $("bars").replaceChildren(...(choices.length ? [bar("Heatmaps: each between its own smallest and largest value", "heat", ["0", "1"])] : []),
      ...(choices.length > 1 ? [bar(`Difference, ${state.right} minus ${state.left}: one scale for all images`, "difference", [num(-most), "0", num(most, true)])] : []));
    const found = ordered(), cards = $("cards");
    cards.replaceChildren();
    const both = state.view === "both" && data.metrics.length && found.length > 2 * PER_SIDE;
    const listed = both ? [] : found.slice(0, state.shown);
    if (both) {
      const [of] = state.by.split("/"), ranked = found.filter((i) => value(i) !== null);
      const [top, low] = of === "gain" ? ["Gained most", "Lost most, or gained least"] : ["Best", "Worst"];
      cards.append(el("h3", {}, top), ...ranked.slice(0, PER_SIDE).map(card), el("h3", {}, low), ...ranked.slice(PER_SIDE).slice(-PER_SIDE).reverse().map(card));
    } else cards.append(el("h3", { class: "hidden" }, "Images in order"), ...listed.map(card));
    $("count").textContent = both ? `${2 * PER_SIDE} of ${found.length} images: ${PER_SIDE} at each end of the order.` : `${listed.length} of ${found.length} images.`;
    const more = $("more");
    more.hidden = !both && listed.length >= found.length;
    more.textContent = both ? "Show all images" : "Show more images";
  }
  $("more").addEventListener("click", () => {
    if (state.view === "both") { state.view = "best"; controls(); show("view"); $("controls").querySelector("select").focus(); return; }
    const before = state.shown;
    state.shown += PER_PAGE;
    show("shown");
    const next = $("cards").children[before + 1];  // after the heading
    if (next) { next.tabIndex = -1; next.focus(); }
  });

  function card(i) {
    const image = data.images[i];
    const said = [image.label !== null ? `class ${apart(image.label)}` : null,
      image.predicted !== null ? `predicted ${apart(image.predicted)}${image.label !== null ? (image.label === image.predicted ? " (right)" : " (wrong)") : ""}` : null,
      image.probability !== null ? `probability ${num(image.probability)}` : null,
      image.explained !== null ? `explained: ${apart(image.explained)}` : null, image.group !== null ? `group ${apart(image.group)}` : null].filter(Boolean);
    const tile = (title, values, kind, caption) => {
      const canvas = el("canvas", { role: "img", "aria-label": `${title}, ${image.name}`, width: image.size[0], height: image.size[1] });
      return { canvas, values, kind, node: el("figure", { class: "tile" }, canvas, el("figcaption", {}, el("strong", {}, title), caption)) };
    };
    const scores = (name) => el("span", { class: "scores" }, data.metrics.slice(0, 6).map((m, k) => el("span", { class: "scores" }, `${m.title} ${seeds.has(name) && score(i, name, k) === null ? "no score" : num(score(i, name, k))}`)));
    const change = el("span", {}, data.metrics.slice(0, 6).map((m, k) => {
      const v = gain(i, k), better = v === null || m.higher === null || v === 0 ? null : (v > 0) === m.higher;
      return el("span", { class: `scores ${better === null ? "" : better ? "gained" : "lost"}` }, `${m.title} ${num(v, true)}${better === null ? "" : better ? " (better)" : " (worse)"}`);
    }));
    const shown = difference(image);
    const bare = !image.maps.some(Boolean), all = data.variants.map(({ name }) => el("span", {}, el("strong", {}, name), scores(name)));
    const tiles = [tile(bare ? "Picture" : "Photograph", null, "heat", bare ? all : null)];
    if (choices.length) tiles.push(tile(state.left, map(image, state.left), "heat", scores(state.left)));
    if (choices.length > 1) {
      tiles.push(tile(state.right, map(image, state.right), "heat", scores(state.right)),
        tile("Difference", shown && shown.map((v) => most ? v / most : 0), "difference", change));
    }
    if (state.controls) for (const name of others) if (name !== state.left && name !== state.right) tiles.push(tile(name, map(image, name), "heat", scores(name)));
    const has = Object.keys(image.evidence).length;
    const node = el("article", { class: "card" }, el("h4", { dir: "auto", title: image.key }, image.name), !image.name.startsWith(image.key) ? el("p", { class: "key" }, `key ${image.key}`) : null, said.length ? el("p", {}, said.join(", ")) : null,
      el("div", { class: "tiles" }, tiles.map((t) => t.node)),
      has ? el("p", {}, el("button", { type: "button", onclick: () => open(image) }, "Where the scores of its patches come from")) : null);
    node.paint = () => tiles.forEach((t) => paint(t.canvas, image, t.values, t.kind));
    seen.observe(node);
    return node;
  }

  // The evidence of one image -----------------------------------------------------------------------------------------

  function decoded(one) {
    if (one.decoded) return one.decoded;
    const out = { n: one.n, quantum: one.quantum, z: array(Float32Array, one.z), gates: array(Float32Array, one.gates) };
    for (const name of ["features", "contributions", "remaining", "active", "scores", "error", "bias", "total"]) out[name] = array(Int32Array, one[name]);
    return one.decoded = out;
  }
  function open(image) {
    const dialog = $("patches"), blocks = Object.keys(image.evidence);
    const view = { image, block: blocks[blocks.length - 1], patch: null };
    const select = el("select", { onchange: () => { view.block = select.value; draw(view); } },
      blocks.map((b) => el("option", { value: b, selected: b === view.block }, `block ${b}`)));
    view.picker = el("div", { class: "picker" });
    view.list = el("div", {});
    view.detail = el("div", { role: "region", "aria-label": "The chosen patch" });
    view.feature = el("div", { role: "region", "aria-label": "The chosen feature" });
    const close = el("button", { type: "button", onclick: () => dialog.close() }, "Close");
    dialog.replaceChildren(el("div", { class: "top" }, el("h2", { id: "patches-title" }, `Patches of ${image.name}`), close),
      el("p", { class: "note" }, `${data.evidence_of ? `Variant: ${data.evidence_of}. ` : ""}Choose a patch: with the pointer, or with the arrow keys. Red patches have a gate above 1, blue ones below 1.`),
      el("div", { class: "evidence" }, el("div", {}, el("label", {}, "Gated block ", select), view.picker, view.list), el("div", {}, view.detail, view.feature)));
    dialog.showModal();
    dialog.scrollTop = 0;
    draw(view);
  }
  function draw(view) {
    const { image } = view, e = decoded(image.evidence[view.block]), [gh, gw] = image.grid;
    view.feature.replaceChildren();
    const order = Array.from(e.scores.keys()).sort((a, b) => e.scores[b] - e.scores[a]);
    if (view.patch === null) view.patch = order[0];
    const widest = e.gates.reduce((m, w) => Math.max(m, Math.abs(Math.log(w))), 0) || 1;
    const canvas = el("canvas", { role: "img", "aria-label": `Gates of block ${view.block} over ${image.name}`, width: image.size[0], height: image.size[1] });
    const name = (t) => `row ${Math.floor(t / gw) + 1}, column ${t % gw + 1}: score ${num(e.scores[t] * e.quantum)}, gate ${num(e.gates[t])}`;
    // One control, not a button per patch: patches of a phone's picker are smaller than a finger needs
    const grid = el("div", { class: "grid", role: "listbox", tabindex: 0, "aria-label": "Patches" });
    grid.style.gridTemplate = `repeat(${gh}, 1fr) / repeat(${gw}, 1fr)`;
    const patches = Array.from({ length: gh * gw }, (_, t) => el("div", { role: "option", id: `patch-${t}`, "aria-selected": "false", "aria-label": name(t), title: name(t), onclick: () => view.choose(t) }));
    grid.append(...patches);
    view.choose = (t) => {
      patches[view.patch].setAttribute("aria-selected", "false");
      view.patch = t;
      patches[t].setAttribute("aria-selected", "true");
      grid.setAttribute("aria-activedescendant", patches[t].id);
      detail(view, e);
    };
    grid.addEventListener("keydown", (event) => {
      const x = view.patch % gw, y = Math.floor(view.patch / gw);
      const to = { ArrowLeft: [x - 1, y], ArrowRight: [x + 1, y], ArrowUp: [x, y - 1], ArrowDown: [x, y + 1], Home: [0, y], End: [gw - 1, y] }[event.key];
      if (!to) return;
      event.preventDefault();
      if (to[0] >= 0 && to[0] < gw && to[1] >= 0 && to[1] < gh) view.choose(to[1] * gw + to[0]);
    });
    view.picker.replaceChildren(canvas, grid);
    paint(canvas, image, Float64Array.from(e.gates, (w) => Math.log(w) / widest), "difference", true);
    const ends = [...order.slice(0, 3), ...order.slice(3).slice(-3)];
    view.list.replaceChildren(el("h3", {}, "Highest and lowest scores"),
      el("table", { class: "fall" }, el("thead", {}, el("tr", {}, ["patch", "score", "gate"].map((text) => el("th", { scope: "col" }, text)))),
        el("tbody", {}, ends.map((t) => el("tr", {}, el("th", { scope: "row" }, el("button", { type: "button", onclick: () => view.choose(t) }, `row ${Math.floor(t / gw) + 1}, column ${t % gw + 1}`)),
          el("td", { class: "number" }, num(e.scores[t] * e.quantum)), el("td", { class: "number" }, num(e.gates[t])))))));
    view.choose(view.patch);
  }

  function detail(view, e) {
    const t = view.patch, q = e.quantum, gw = view.image.grid[1], steps = [];
    let total = 0;  // whole quanta: the sum is exact
    const step = (label, by, extra) => { steps.push({ label, from: total, to: total + by, by, ...extra }); total += by; };
    for (let k = 0; k < e.n; k++) {
      const feature = e.features[t * e.n + k];
      if (feature >= 0) step(`feature ${feature}`, e.contributions[t * e.n + k], { feature });
    }
    const rest = e.active[t] - steps.length;
    step(`${rest} remaining feature${rest === 1 ? "" : "s"}`, e.remaining[t], {});
    const score = total;
    steps.push({ label: "score s", from: 0, to: score, by: score, total: true });
    step("decoder's bias and scale", e.bias[t], {});
    step("SAE's error", e.error[t], {});
    steps.push({ label: "g·x, without an SAE", from: 0, to: total, by: total, total: true });
    const low = Math.min(0, ...steps.flatMap((s) => [s.from, s.to])), high = Math.max(0, ...steps.flatMap((s) => [s.from, s.to]));
    const at = (v) => 100 * (v - low) / ((high - low) || 1);
    const rows = steps.map((s) => {
      const rail = el("span", { class: "rail", "aria-hidden": "true" }), piece = el("span", { class: s.total ? "sum" : s.by >= 0 ? "up" : "down" }), zero = el("span", { class: "zero" });
      piece.style.left = `${at(Math.min(s.from, s.to))}%`;
      piece.style.width = `${Math.abs(at(s.to) - at(s.from))}%`;
      zero.style.left = `${at(0)}%`;
      rail.append(piece, zero);
      const known = s.feature !== undefined && data.features[`${view.block}/${s.feature}`];
      const label = known ? el("button", { type: "button", onclick: () => feature(view, s.feature) }, s.label) : s.label;
      return el("tr", { class: s.total ? "total" : null }, el("th", { scope: "row" }, label), el("td", { class: "number" }, num(s.by * q, !s.total)), el("td", { class: "track" }, rail), el("td", { class: "number" }, num(s.to * q)));
    });
    view.detail.replaceChildren(el("h3", {}, `Block ${view.block}, patch in row ${Math.floor(t / gw) + 1}, column ${t % gw + 1}`),
      el("p", { class: "chain" }, `score ${num(score * q)} → z ${num(e.z[t])} → gate ${num(e.gates[t])}`),
      el("table", { class: "fall" }, el("caption", {}, "Contributions of the features, f (D · g), added up from top to bottom: blue adds, orange takes away"),
        el("thead", {}, el("tr", {}, ["part", "adds", "", "sum"].map((text) => text ? el("th", { scope: "col" }, text) : el("td", {})))), el("tbody", {}, rows)),
      curve(e, t));
  }
  function curve(e, t) {  // the gates of all patches against their z
    const W = 320, H = 150, L = 34, B = 26, zs = Array.from(e.z), ws = Array.from(e.gates, Math.log);
    const span = (values) => { const a = Math.min(...values), b = Math.max(...values); return a === b ? [a - 1, b + 1] : [a, b]; };
    const [x0, x1] = span(zs), [y0, y1] = span(ws);
    const x = (v) => L + (W - L - 10) * (v - x0) / (x1 - x0), y = (v) => H - B - (H - B - 10) * (v - y0) / (y1 - y0);
    const text = (a, b, anchor, words) => el("text", { x: a, y: b, "text-anchor": anchor }, words);
    return el("svg", { class: "plot", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `The gate by z for all patches of the image; this patch: z ${num(e.z[t])}, gate ${num(e.gates[t])}` },
      el("line", { class: "axis", x1: L, x2: W, y1: H - B, y2: H - B }), el("line", { class: "axis", x1: L, x2: L, y1: 5, y2: H - B }),
      zs.map((z, i) => el("circle", { class: "dot", cx: x(z), cy: y(ws[i]), r: 2 })), el("circle", { class: "mark", cx: x(zs[t]), cy: y(ws[t]), r: 5 }),
      text(L, H - 9, "start", `z ${num(x0)}`), text(W - 4, H - 9, "end", num(x1)), text(L - 4, 14, "end", num(Math.exp(y1))), text(L - 4, H - B, "end", num(Math.exp(y0))), text(L + 5, 14, "start", "gate"));
  }

  function feature(view, number) {
    const f = data.features[`${view.block}/${number}`], title = el("h3", { tabindex: "-1" }, `Feature ${number} of block ${view.block}`);
    const rows = data.ablations.filter((a) => a.image === view.image.key && String(a.block) === view.block && a.feature === number);
    const table = (caption, heads, lines) => el("table", { class: "fall" }, el("caption", {}, caption), el("thead", {}, el("tr", {}, heads.map((text) => el("th", { scope: "col" }, text)))),
      el("tbody", {}, lines.map(([first, ...cells]) => el("tr", {}, el("th", { scope: "row" }, first), cells.map((c) => el("td", { class: "number" }, c))))));
    view.feature.replaceChildren(title,
      el("p", {}, `Active on ${num(100 * f.density)}% of ${f.patches.toLocaleString("en")} patches of ${f.images} images.`), histogram(f),
      ...(f.lift.length ? [table("Class lift: its share of the feature's activation over its share of the patches", ["class", "lift"], f.lift.map(([name, v]) => [name, num(v)]))] : []),
      ...(f.crops.length ? [el("h4", {}, "The patches that activate it most"), el("ul", { class: "crops" }, f.crops.map(crop))] : []),
      ...rows.flatMap((a) => [table("Without this feature in this image", ["change of", "predicted", "actual"], [
        [`gate of row ${Math.floor(a.patch / view.image.grid[1]) + 1}, column ${a.patch % view.image.grid[1] + 1} (now ${num(a.gate)})`, num(a.predicted_gate, true), num(a.actual_gate, true)],
        ["target's logit", num(a.predicted_logit, true), num(a.actual_logit, true)]])]));
    title.focus();
    title.scrollIntoView({ block: "nearest" });
  }
  function histogram(f) {
    const W = 320, H = 110, most = Math.max(...f.counts, 1), step = W / Math.max(f.counts.length, 1);
    if (!f.counts.length) return null;
    return el("svg", { class: "plot", viewBox: `0 0 ${W} ${H + 20}`, role: "img", "aria-label": `Histogram of its activations where it is active, from ${num(f.edges[0])} to ${num(f.edges[f.edges.length - 1])}: ${f.counts.join(", ")} patches` },
      f.counts.map((c, i) => el("rect", { class: "block", x: i * step, width: Math.max(step - 1, 1), y: H - H * c / most, height: H * c / most })),
      el("line", { class: "axis", x1: 0, x2: W, y1: H, y2: H }), el("text", { x: 0, y: H + 14 }, num(f.edges[0])), el("text", { x: W, y: H + 14, "text-anchor": "end" }, `activation ${num(f.edges[f.edges.length - 1])}`));
  }
  function crop(c) {
    const box = el("span", { "aria-hidden": "true" }), [w, h] = c.size, [left, top, width, height] = c.box;
    Object.assign(box.style, { left: `${100 * left / w}%`, top: `${100 * top / h}%`, width: `${100 * width / w}%`, height: `${100 * height / h}%` });
    return el("li", {}, el("div", { class: "crop" }, el("img", { src: c.picture, alt: `Part of ${c.name}`, title: c.name, width: w, height: h }), box), `${num(c.activation)}${c.label ? `, ${c.label}` : ""}`);
  }

  controls();
  show();
})();

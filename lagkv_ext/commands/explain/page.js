"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const [text, detail, tip, spoken, map] = ["text", "detail", "tip", "spoken", "map"].map(byId);
  const [layerSelect, headSelect] = ["layer", "head"].map(byId);
  const { seen, layers } = data;
  const STEPS = 10;

  // -- arrays

  const bytes = (base64) => {
    const raw = atob(base64);
    const out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  };
  const array = (x) => (x === null ? null : new { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array }[x.dtype](bytes(x.base64).buffer));
  // A score is the upper half of a 32-bit float.
  const wide = new DataView(new ArrayBuffer(4));
  const float = (half) => {
    wide.setUint16(0, half);
    return wide.getFloat32(0);
  };
  for (const layer of layers) {
    layer.bits = bytes(layer.kept.base64);
    layer.stride = Math.ceil(seen / 8);
    for (const name of ["score", "rank", "best", "compared"]) layer[name] = array(layer[name]);
    layer.counts = new Uint16Array(seen);
    for (let h = 0; h < layer.heads; h++) {
      const row = h * layer.stride;
      for (let i = 0; i < seen; i++) layer.counts[i] += (layer.bits[row + (i >> 3)] >> (i & 7)) & 1;
    }
  }
  const keeps = (layer, head, i) => (layer.bits[head * layer.stride + (i >> 3)] >> (i & 7)) & 1;

  // -- what is selected: all layers (null) or one, all of its heads (null) or one

  let layer = null;
  let head = null;
  const chosenLayers = () => (layer === null ? layers : [layer]);
  const headCount = () => (head === null ? chosenLayers().reduce((sum, x) => sum + x.heads, 0) : 1);
  const keptCount = (i) => (head === null ? chosenLayers().reduce((sum, x) => sum + x.counts[i], 0) : keeps(layer, head, i));
  const step = (count, all) => (count === 0 ? 0 : count === all ? STEPS : Math.min(STEPS - 1, Math.max(1, Math.round((STEPS * count) / all))));
  const sink = () => Math.min(...chosenLayers().map((x) => x.sink));
  const windowStart = () => Math.max(...chosenLayers().map((x) => x.window));

  // -- tokens as text

  const tokens = data.tokens;
  const known = tokens === null ? 0 : tokens.pieces.length;
  const sets = Object.fromEntries(["special", "unknown", "parts"].map((name) => [name, new Set(tokens === null ? [] : tokens[name])]));
  const BIDI = { "\u202a": "LRE", "\u202b": "RLE", "\u202c": "PDF", "\u202d": "LRO", "\u202e": "RLO", "\u2066": "LRI", "\u2067": "RLI", "\u2068": "FSI", "\u2069": "PDI" };
  // Bidi controls would turn around the text after them; control characters have no shape.
  const visible = (piece) =>
    piece.replace(/[\u202a-\u202e\u2066-\u2069]/g, (c) => `\u27e8${BIDI[c]}\u27e9`).replace(/[\0-\x08\x0b-\x1f\x7f]/g, (c) => (c === "\x7f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0))));
  const invisible = (piece) => /^[\p{Default_Ignorable_Code_Point}\ufeff]*$/u.test(piece);
  const quoted = (piece) =>
    `\u201c${piece.replace(/[\p{C}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/gu, (c) => (c === "\n" ? "\\n" : c === "\t" ? "\\t" : `\\u{${c.codePointAt(0).toString(16)}}`))}\u201d`;
  const name = (i) => {
    if (i >= known) return `token ${i}`;
    if (sets.special.has(i)) return tokens.pieces[i];
    if (!sets.parts.has(i)) return quoted(tokens.pieces[i]);
    let first = i;
    while (first > 0 && tokens.pieces[first] === "") first--;
    return `part of ${quoted(tokens.pieces[first])}`;
  };

  const spans = new Array(seen);
  const fixed = new Array(seen); // classes that no selection changes
  const blocks = [];
  const fill = () => {
    const between = tokens === null ? {} : tokens.between;
    const MOST = 2000; // tokens without a line break in one block
    const LEAST = 200;
    let block = null;
    let size = 0;
    const gap = (at) => {
      const span = document.createElement("span");
      span.className = "gap";
      span.textContent = visible(between[at]);
      block.append(span);
    };
    for (let i = 0; i < seen; i++) {
      if (block === null) {
        block = document.createElement("div");
        block.className = "block";
        block.dir = "auto";
        block.first = i;
        size = 0;
      }
      if (between[i] !== undefined) gap(i);
      const span = document.createElement("span");
      const classes = [];
      const piece = i < known ? tokens.pieces[i] : null;
      if (piece === null) {
        span.textContent = String(i);
        classes.push("plain");
      } else {
        span.textContent = visible(piece);
        if (sets.special.has(i)) classes.push("label");
        if (sets.unknown.has(i)) classes.push("unknown");
        if (invisible(visible(piece))) classes.push("hidden-text");
        if (piece.includes("\n")) classes.push("nl");
      }
      span.token = i;
      spans[i] = span;
      fixed[i] = classes.length ? ` ${classes.join(" ")}` : "";
      block.append(span);
      size++;
      const ends = piece === null ? size >= LEAST : (size >= LEAST && piece.endsWith("\n")) || size >= MOST;
      if (ends || i === seen - 1) {
        if (i === seen - 1 && between[seen] !== undefined) gap(seen);
        block.last = i;
        // Until it has been drawn: 90 characters a line.
        const lines = block.textContent.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / 90)), 0);
        block.style.containIntrinsicBlockSize = `auto ${Math.round(lines * 28.5)}px`;
        blocks.push(block);
        block = null;
      }
    }
    text.append(...blocks);
  };

  const shade = () => {
    const all = headCount();
    const before = sink();
    const after = windowStart();
    for (let i = 0; i < seen; i++) {
      const region = i < before ? " sink" : i >= after ? " window" : "";
      spans[i].className = `k${step(keptCount(i), all)}${region}${fixed[i]}`;
    }
    if (current !== null) spans[current].classList.add("current");
  };

  // -- what is known of a token

  const percent = (share) => `${share > 0.995 && share < 1 ? "99" : share < 0.005 && share > 0 ? "under 1" : Math.round(100 * share)}%`;
  const number = (x) => (Number.isNaN(x) ? "NaN" : Number(x.toPrecision(3)).toString());
  const compared = (x, at) => (x.compared === null ? x.compared_all : x.compared[at]);
  // Of one layer: rank 1 is the highest score; null where the token was never compared.
  const ranks = (x, i) => {
    if (x.rank === null) return null;
    if (data.detail === "layers") return x.rank[i] === 0 ? null : { best: x.best[i], mean: x.rank[i], score: float(x.score[i]), of: compared(x, i) };
    let [best, sum, score, count, of] = [Infinity, 0, 0, 0, 0];
    for (let h = 0; h < x.heads; h++) {
      if (head !== null && h !== head) continue;
      const at = h * seen + i;
      if (x.rank[at] === 0) continue;
      best = Math.min(best, x.rank[at]);
      sum += x.rank[at];
      score += float(x.score[at]);
      of = Math.max(of, compared(x, at));
      count++;
    }
    return count === 0 ? null : { best, mean: sum / count, score: score / count, of };
  };
  const region = (i) => (i < sink() ? "attention sink: always kept" : i >= windowStart() ? "recent window: always kept" : "");
  const statement = (i) => {
    const all = headCount();
    const kept = keptCount(i);
    const parts = [`${name(i)}, token ${i}`];
    if (head !== null) parts.push(kept ? "kept" : "dropped");
    else parts.push(`kept by ${kept} of ${all} heads (${percent(kept / all)})`);
    if (region(i)) parts.push(region(i));
    const found = chosenLayers().map((x) => ranks(x, i)).filter((x) => x !== null);
    if (found.length) {
      const mean = (of) => found.reduce((sum, x) => sum + of(x), 0) / found.length;
      const many = Math.max(...found.map((x) => x.of));
      const best = Math.min(...found.map((x) => x.best));
      const score = number(mean((x) => x.score));
      if (headCount() === 1) parts.push(`rank ${best} of ${many}, score ${score}`);
      else parts.push(`ranks of ${many}: best ${best}, mean ${Math.round(mean((x) => x.mean))}; mean score ${score}`);
    } else if (!region(i) && data.detail === "none") parts.push("score and rank are not in a saved cache");
    return parts;
  };

  const element = (tag, content, className) => {
    const out = document.createElement(tag);
    if (content !== undefined) out.textContent = content;
    if (className) out.className = className;
    return out;
  };
  const table = (heading, rows) => {
    const out = document.createElement("table");
    const line = (cells, tag) => {
      const row = document.createElement("tr");
      for (const cell of cells) row.append(cell instanceof Node ? cell : element(tag, cell));
      return row;
    };
    out.append(line(heading, "th"));
    for (const row of rows) out.append(line(row, "td"));
    return out;
  };
  const show = (i) => {
    const heading = element("h2");
    heading.append(element("bdi", name(i)));
    const id = i < known ? `, id ${tokens.ids[i]}` : "";
    const out = [heading, element("p", `token ${i}${id}${sets.unknown.has(i) ? ", not known to the tokenizer" : ""}`)];
    out.push(...statement(i).slice(1).map((x) => element("p", x)));
    if (layer === null) {
      const rows = layers.map((x) => {
        const heads = x.heads > 64 ? `${x.counts[i]} of ${x.heads}` : Array.from({ length: x.heads }, (_, h) => (keeps(x, h, i) ? "\u25a0" : "\u25a1")).join("");
        const found = ranks(x, i);
        return [String(x.index), element("td", heads, "heads"), ...(data.detail === "none" ? [] : [found === null ? "" : `${found.best} of ${found.of}`, found === null ? "" : number(found.score)])];
      });
      out.push(table(["layer", element("th", "heads", "heads"), ...(data.detail === "none" ? [] : ["best rank", "mean score"])], rows));
      out.push(element("p", "A square for each head: filled where it keeps the token.", "keys"));
    } else {
      const per = data.detail === "heads";
      const rows = Array.from({ length: layer.heads }, (_, h) => {
        const at = h * seen + i;
        const scored = per && layer.rank[at] !== 0;
        return [String(h), keeps(layer, h, i) ? "\u25a0 kept" : "\u25a1 dropped", ...(per ? [scored ? `${layer.rank[at]} of ${compared(layer, at)}` : "", scored ? number(float(layer.score[at])) : ""] : [])];
      });
      const heads = table(["head", "", ...(per ? ["rank", "score"] : [])], rows);
      if (head !== null) heads.rows[head + 1].className = "chosen";
      out.push(heads);
      if (data.detail === "layers") out.push(element("p", "Ranks and scores of single heads are left out of a page of this size; the JSON file has them."));
    }
    detail.replaceChildren(...out);
  };

  // -- the current token: chosen by click, key or the map; the one pointed at is shown meanwhile

  let current = null;
  const choose = (i, scroll) => {
    if (current !== null) spans[current].classList.remove("current");
    current = i;
    spans[i].classList.add("current");
    show(i);
    spoken.textContent = statement(i).join("; ");
    if (scroll) {
      spans[i].scrollIntoView({ block: scroll });
      // Blocks on the way had estimated heights until now.
      requestAnimationFrame(() => spans[i].scrollIntoView({ block: scroll }));
    }
  };
  const tokenAt = (event) => (event.target instanceof Element && event.target.token !== undefined ? event.target.token : null);
  text.addEventListener("pointermove", (event) => {
    const i = tokenAt(event);
    tip.hidden = i === null;
    if (i === null) return;
    tip.textContent = statement(i).join("\n");
    place(event);
    show(i);
  });
  const place = (event) => {
    const box = tip.getBoundingClientRect();
    const x = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const y = event.clientY + 20 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 20;
    tip.style.transform = `translate(${Math.max(0, x)}px, ${Math.max(0, y)}px)`;
  };
  text.addEventListener("pointerleave", () => {
    tip.hidden = true;
    if (current !== null) show(current);
  });
  text.addEventListener("click", (event) => {
    const i = tokenAt(event);
    if (i !== null) choose(i);
  });
  const line = (from, direction) => {
    const start = spans[from].getBoundingClientRect();
    let best = from;
    let distance = Infinity;
    let top = null;
    for (let i = from + direction; i >= 0 && i < seen; i += direction) {
      const box = spans[i].getBoundingClientRect();
      if (Math.abs(box.top - start.top) < 4) continue;
      if (top === null) top = box.top;
      else if (Math.abs(box.top - top) >= 4) break;
      if (Math.abs(box.left - start.left) < distance) [best, distance] = [i, Math.abs(box.left - start.left)];
    }
    return best;
  };
  text.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const from = current === null ? -1 : current;
    const rightToLeft = current !== null && getComputedStyle(spans[current].parentElement).direction === "rtl";
    const forward = rightToLeft ? "ArrowLeft" : "ArrowRight";
    const backward = rightToLeft ? "ArrowRight" : "ArrowLeft";
    const targets = {
      [forward]: () => Math.min(seen - 1, from + 1),
      [backward]: () => Math.max(0, from - 1),
      ArrowDown: () => (current === null ? 0 : line(from, 1)),
      ArrowUp: () => (current === null ? 0 : line(from, -1)),
      Home: () => 0,
      End: () => seen - 1,
    };
    const target = targets[event.key];
    if (target === undefined) return;
    event.preventDefault();
    choose(target(), event.key === "Home" || event.key === "End" ? "center" : "nearest");
  });
  document.addEventListener("keydown", (event) => {
    if (event.target instanceof HTMLSelectElement || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { "[": -1, "]": 1 }[event.key];
    if (by === undefined) return;
    layerSelect.selectedIndex = Math.min(layerSelect.length - 1, Math.max(0, layerSelect.selectedIndex + by));
    layerSelect.dispatchEvent(new Event("change"));
  });

  // -- selections

  const option = (value, label) => {
    const out = element("option", label);
    out.value = value;
    return out;
  };
  const share = (x) => percent(x.counts.reduce((sum, count) => sum + count, 0) / (seen * x.heads));
  layerSelect.append(option("", layers.length === 1 ? "all (1 layer)" : `all ${layers.length} layers`), ...layers.map((x, at) => option(String(at), `${x.index} (${share(x)} kept)`)));
  const offerHeads = () => {
    headSelect.replaceChildren(option("", "all"), ...(layer === null ? [] : Array.from({ length: layer.heads }, (_, h) => option(String(h), String(h)))));
    headSelect.disabled = layer === null;
  };
  const changed = () => {
    shade();
    draw();
    if (current !== null) show(current);
  };
  layerSelect.addEventListener("change", () => {
    layer = layerSelect.value === "" ? null : layers[Number(layerSelect.value)];
    head = null;
    offerHeads();
    changed();
  });
  headSelect.addEventListener("change", () => {
    head = headSelect.value === "" ? null : Number(headSelect.value);
    changed();
  });

  // -- the map: layers by positions

  const BAND = 7; // pixels for sink and window above the rows
  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const rgb = (name) => {
      const hex = style.getPropertyValue(name).trim();
      return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    };
    return { steps: Array.from({ length: STEPS + 1 }, (_, i) => rgb(`--k${i}`)), ink: style.getPropertyValue("--ink"), mark: style.getPropertyValue("--mark"), line: style.getPropertyValue("--line") };
  };
  let picture = null; // the map without the marks that scrolling moves
  const draw = () => {
    const scale = devicePixelRatio || 1;
    const width = Math.max(1, Math.round(map.clientWidth * scale));
    const tall = Math.max(2, Math.min(16, Math.floor(240 / layers.length)));
    map.style.height = `${layers.length * tall + BAND + 1}px`;
    picture = document.createElement("canvas");
    picture.width = map.width = width;
    picture.height = map.height = Math.round((layers.length * tall + BAND + 1) * scale);
    const { steps, ink, mark, line: border } = colours();
    const context = picture.getContext("2d");
    const columns = Math.min(width, seen);
    const image = context.createImageData(columns, layers.length);
    layers.forEach((x, row) => {
      for (let c = 0; c < columns; c++) {
        const first = Math.floor((c * seen) / columns);
        const last = Math.max(first + 1, Math.floor(((c + 1) * seen) / columns));
        let sum = 0;
        for (let i = first; i < last; i++) sum += head !== null && x === layer ? keeps(x, head, i) * x.heads : x.counts[i];
        const at = (STEPS * sum) / ((last - first) * x.heads);
        const low = Math.min(STEPS - 1, Math.floor(at));
        const colour = steps[low].map((value, k) => value + (at - low) * (steps[low + 1][k] - value));
        image.data.set([...colour, 255], 4 * (row * columns + c));
      }
    });
    const small = document.createElement("canvas");
    small.width = columns;
    small.height = layers.length;
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    const top = BAND * scale;
    context.drawImage(small, 0, top, width, layers.length * tall * scale);
    context.fillStyle = ink;
    const band = (from, to) => context.fillRect((from / seen) * width, 0, Math.max(1, ((to - from) / seen) * width), 3 * scale);
    if (sink() > 0) band(0, sink());
    context.globalAlpha = 0.45;
    band(windowStart(), seen);
    context.globalAlpha = 1;
    context.strokeStyle = border;
    context.strokeRect(0.5, top + 0.5, width - 1, layers.length * tall * scale - 1);
    if (layer !== null) {
      context.strokeStyle = mark;
      context.lineWidth = 2;
      context.strokeRect(1, top + layers.indexOf(layer) * tall * scale, width - 2, tall * scale);
    }
    view();
  };
  const shown = new Set();
  const view = () => {
    if (picture === null) return;
    const context = map.getContext("2d");
    context.clearRect(0, 0, map.width, map.height);
    context.drawImage(picture, 0, 0);
    if (shown.size === 0) return;
    const first = Math.min(...[...shown].map((x) => x.first));
    const last = Math.max(...[...shown].map((x) => x.last)) + 1;
    if (last - first >= seen) return;
    context.strokeStyle = colours().mark;
    context.lineWidth = 2;
    context.strokeRect((first / seen) * map.width, 1, Math.max(2, ((last - first) / seen) * map.width), map.height - 2);
  };
  const cellAt = (event) => {
    const box = map.getBoundingClientRect();
    const token = Math.min(seen - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * seen)));
    const row = Math.floor(((event.clientY - box.top - BAND) / (box.height - BAND)) * layers.length);
    return { token, row: Math.min(layers.length - 1, Math.max(0, row)) };
  };
  map.addEventListener("pointermove", (event) => {
    const { token, row } = cellAt(event);
    const x = layers[row];
    tip.hidden = false;
    tip.textContent = `layer ${x.index}, token ${token}: kept by ${x.counts[token]} of ${x.heads} heads`;
    place(event);
  });
  map.addEventListener("pointerleave", () => {
    tip.hidden = true;
  });
  map.addEventListener("click", (event) => choose(cellAt(event).token, "center"));

  // -- light and dark

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = (name) => {
    document.documentElement.dataset.theme = name;
    if (picture !== null) draw();
  };
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

  theme(dark.matches ? "dark" : "light");
  offerHeads();
  fill();
  shade();
  draw();
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) shown[entry.isIntersecting ? "add" : "delete"](entry.target);
    view();
  });
  blocks.forEach((block) => observer.observe(block));
  addEventListener("resize", draw);
  // Milliseconds from the start of loading until everything answers.
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();

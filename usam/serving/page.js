"use strict";
// Places are voxels (x, y, z) of the scan turned to LPS. A plane is named by its axis: 2 axial,
// 1 coronal, 0 sagittal; its columns and rows are the two other axes, z drawn upwards.

const key = location.hash.slice(5) || sessionStorage.getItem("key") || "";
sessionStorage.setItem("key", key);
const tab = sessionStorage.getItem("tab") || crypto.randomUUID();
sessionStorage.setItem("tab", tab);
history.replaceState(null, "", location.pathname);

const ACROSS = [[1, 2], [0, 2], [0, 1]];
const NAMES = ["sagittal", "coronal", "axial"];
const CACHE_BYTES = 300e6;
const $ = (id) => document.getElementById(id);
const canvases = [...document.querySelectorAll("canvas")].sort((a, b) => a.dataset.axis - b.dataset.axis);

let work = null, scan = null, active = 1, boxing = false, busy = false, presets = [];
const view = { place: [0, 0, 0], zoom: [1, 1, 1], pan: [[0, 0], [0, 0], [0, 0]], window: [0, 1] };
const cache = new Map();
let cached = 0, drag = null, last = 2, queued = false;

// ---------------------------------------------------------------- talking to the server

async function ask(path, content) {
  const headers = { Authorization: `Bearer ${key}` };
  const options = content === undefined ? { headers } : {
    method: "POST", headers, body: JSON.stringify({ tab, scan: scan && scan.scan, ...content }),
  };
  const answer = await fetch(`api/${path}`, options);
  const reply = await answer.json();
  if (!answer.ok) throw new Error(reply.detail || answer.statusText);
  return reply;
}

function say(text, isError) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}

async function act(text, action) {
  if (busy) return;
  busy = true;
  const start = performance.now();
  const tick = setInterval(() => say(`${text}: ${Math.round((performance.now() - start) / 1000)} s`), 500);
  try {
    const done = await action();
    say(typeof done === "string" ? done : "saved");
  } catch (error) {
    say(error.message, true);
  }
  clearInterval(tick);
  busy = false;
}

function plane(kind, axis, k) {
  const name = `${kind} ${axis} ${k}`, known = cache.get(name);
  if (known) {
    cache.delete(name);
    cache.set(name, known); // the last used is the last dropped
    return known.data;
  }
  const entry = { data: null, bytes: 0 }, mine = scan;
  cache.set(name, entry);
  const query = new URLSearchParams({ scan: scan.scan, axis, k, kind });
  fetch(`api/slice?${query}`, { headers: { Authorization: `Bearer ${key}` } }).then(async (answer) => {
    if (!answer.ok) throw new Error((await answer.json()).detail);
    const bytes = await answer.arrayBuffer();
    if (mine !== scan || cache.get(name) !== entry) return;
    const types = { int16: Int16Array, float32: Float32Array, uint8: Uint8Array };
    entry.data = new (kind === "label" ? Uint8Array : types[scan.dtype])(bytes);
    entry.bytes = bytes.byteLength;
    cached += entry.bytes;
    for (const [other, old] of cache) {
      if (cached <= CACHE_BYTES) break;
      if (old.data && other !== name) { cache.delete(other); cached -= old.bytes; }
    }
    draw();
  }).catch((error) => { cache.delete(name); say(error.message, true); });
  return null;
}

function forget(part) { // label planes that changed
  for (const [name, entry] of cache) {
    const [kind, axis, k] = name.split(" ");
    if (kind === "label" && (!part || (part[axis][0] <= k && k < part[axis][1]))) {
      cache.delete(name);
      cached -= entry.bytes;
    }
  }
}

// ---------------------------------------------------------------- drawing

function frame(axis) { // how a plane lies on its canvas
  const [a, b] = ACROSS[axis], canvas = canvases[axis];
  const size = [scan.shape[a] * scan.spacing[a], scan.shape[b] * scan.spacing[b]];
  const scale = Math.min(canvas.width / size[0], canvas.height / size[1]) * view.zoom[axis];
  const [dx, dy] = view.pan[axis];
  return {
    a, b, flip: b === 2, sx: scale * scan.spacing[a], sy: scale * scan.spacing[b],
    x: (canvas.width - size[0] * scale) / 2 + dx, y: (canvas.height - size[1] * scale) / 2 + dy,
  };
}

function toCanvas(axis, place) { // the middle of a voxel
  const f = frame(axis), row = f.flip ? scan.shape[f.b] - 1 - place[f.b] : place[f.b];
  return [f.x + (place[f.a] + 0.5) * f.sx, f.y + (row + 0.5) * f.sy];
}

function toVoxel(axis, x, y) {
  const f = frame(axis), place = [...view.place];
  const column = Math.floor((x - f.x) / f.sx), row = Math.floor((y - f.y) / f.sy);
  place[f.a] = column;
  place[f.b] = f.flip ? scan.shape[f.b] - 1 - row : row;
  return place;
}

const inScan = (place) => place.every((value, axis) => value >= 0 && value < scan.shape[axis]);

function draw() {
  if (queued || !scan) return;
  queued = true;
  requestAnimationFrame(() => { queued = false; canvases.forEach((_, axis) => drawPlane(axis)); });
}

function rgb(color) { return [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16)); }

function drawPlane(axis) {
  const canvas = canvases[axis], context = canvas.getContext("2d"), k = view.place[axis];
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  context.fillStyle = "#000";
  context.fillRect(0, 0, width, height);
  canvas.nextElementSibling.textContent = `${NAMES[axis]} ${k + 1} / ${scan.shape[axis]}`;
  const image = plane("image", axis, k), label = plane("label", axis, k), f = frame(axis);
  for (const step of [1, -1, 2, -2, 3, -3]) {
    if (k + step >= 0 && k + step < scan.shape[axis]) { plane("image", axis, k + step); }
  }
  if (!image) return;
  const columns = scan.shape[f.a], rows = scan.shape[f.b];
  const picture = new ImageData(columns, rows), [low, high] = view.window;
  const colors = {};
  for (const one of work.labels) colors[one.label] = rgb(one.color);
  const fill = $("fill").checked;
  for (let row = 0; row < rows; row++) {
    const from = (f.flip ? rows - 1 - row : row) * columns;
    for (let column = 0; column < columns; column++) {
      const at = 4 * (row * columns + column);
      let grey = 255 * (image[from + column] - low) / (high - low);
      grey = Math.max(0, Math.min(255, grey));
      const color = fill && label && colors[label[from + column]];
      for (let c = 0; c < 3; c++) picture.data[at + c] = color ? 0.7 * grey + 0.3 * color[c] : grey;
      picture.data[at + 3] = 255;
    }
  }
  const scratch = new OffscreenCanvas(columns, rows);
  scratch.getContext("2d").putImageData(picture, 0, 0);
  context.imageSmoothingEnabled = true;
  context.drawImage(scratch, f.x, f.y, columns * f.sx, rows * f.sy);
  if (label) outlines(context, label, columns, rows, f);
  marks(context, axis);
}

function outlines(context, label, columns, rows, f) { // the edges between labels
  const paths = {};
  const edge = (id, x1, y1, x2, y2) => {
    const path = paths[id] || (paths[id] = new Path2D());
    path.moveTo(f.x + x1 * f.sx, f.y + y1 * f.sy);
    path.lineTo(f.x + x2 * f.sx, f.y + y2 * f.sy);
  };
  const at = (row, column) => column < 0 || row < 0 || column >= columns || row >= rows ? 0
    : label[(f.flip ? rows - 1 - row : row) * columns + column];
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const id = at(row, column);
      if (!id) continue;
      if (at(row, column - 1) !== id) edge(id, column, row, column, row + 1);
      if (at(row, column + 1) !== id) edge(id, column + 1, row, column + 1, row + 1);
      if (at(row - 1, column) !== id) edge(id, column, row, column + 1, row);
      if (at(row + 1, column) !== id) edge(id, column, row + 1, column + 1, row + 1);
    }
  }
  for (const one of work.labels) {
    if (!paths[one.label]) continue;
    context.strokeStyle = one.color;
    context.lineWidth = one.label === active ? 2.5 : 1.5;
    context.stroke(paths[one.label]);
  }
}

function marks(context, axis) {
  const object = scan.objects.find((one) => one.label === active);
  if (object && $("dots").checked) {
    for (const [x, y, z, inside] of object.points) {
      const place = [x, y, z];
      if (place[axis] !== view.place[axis]) continue;
      const [cx, cy] = toCanvas(axis, place);
      context.beginPath();
      context.arc(cx, cy, 5, 0, 7);
      context.fillStyle = inside ? "#fff" : "#000";
      context.fill();
      context.strokeStyle = inside ? "#000" : "#fff";
      context.lineWidth = 2;
      context.stroke();
    }
  }
  const [x, y] = toCanvas(axis, view.place);
  context.strokeStyle = "#5b8def88";
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(0, y); context.lineTo(x - 8, y); context.moveTo(x + 8, y); context.lineTo(1e4, y);
  context.moveTo(x, 0); context.lineTo(x, y - 8); context.moveTo(x, y + 8); context.lineTo(x, 1e4);
  context.stroke();
  if (drag && drag.kind === "box" && drag.axis === axis) {
    context.strokeStyle = "#fff";
    context.strokeRect(drag.x, drag.y, drag.toX - drag.x, drag.toY - drag.y);
  }
}

// ---------------------------------------------------------------- lists

function item(parent, isOn, onClick) {
  const li = document.createElement("li");
  li.className = isOn ? "on" : "";
  li.addEventListener("click", onClick);
  parent.append(li);
  return li;
}

function input(type, value, onChange, title) {
  const box = document.createElement("input");
  Object.assign(box, { type, value, title });
  box.addEventListener("change", () => onChange(box));
  return box;
}

function lists() {
  $("scans").replaceChildren();
  for (const one of work.scans) {
    const li = item($("scans"), scan && one.name === scan.scan, () => open(one.name));
    const small = document.createElement("small");
    small.textContent = one.state === "open" ? "" : one.state;
    li.append(one.name, small);
  }
  $("objects").replaceChildren();
  for (const one of work.labels) {
    const object = scan && scan.objects.find((other) => other.label === one.label);
    const li = item($("objects"), one.label === active, () => choose(one.label));
    li.append(
      input("color", one.color, (box) => rename(one, one.name, box.value), "colour"),
      input("text", one.name, (box) => rename(one, box.value, one.color), "name"),
    );
    const lock = document.createElement("button");
    lock.textContent = object && object.locked ? "locked" : "lock";
    lock.title = "others cannot cover a locked object";
    lock.addEventListener("click", (event) => {
      event.stopPropagation();
      change("lock", { label: one.label, locked: !(object && object.locked) }, "locking");
    });
    li.append(lock);
  }
  const object = scan && scan.objects.find((one) => one.label === active);
  const mine = scan && !scan.read_only;
  $("undo").disabled = !mine || !object;
  $("more").disabled = !mine || !object || (work.volumetric && !object.more);
  $("more").textContent = work.volumetric ? "Continue" : "To other slices";
  $("box").disabled = !mine || !work.boxes;
  $("box").className = boxing ? "on" : "";
  for (const id of ["add", "clear", "save"]) $(id).disabled = !mine;
}

function choose(label) {
  if (label === active) return;
  active = label;
  lists();
  draw();
}

const rename = (one, name, color) => act("saving", async () => {
  try {
    work = { ...work, ...await ask("label", { label: one.label, name, color }) };
  } finally {
    lists();
    draw();
  }
});

// ---------------------------------------------------------------- actions

const open = (name) => act("opening", async () => {
  const reply = await ask("open", { scan: name });
  scan = reply;
  cache.clear();
  cached = 0;
  view.place = scan.shape.map((size) => Math.floor(size / 2));
  view.zoom = [1, 1, 1];
  view.pan = [[0, 0], [0, 0], [0, 0]];
  sessionStorage.setItem("scan", name);
  presets = [["this scan", scan.window], ...Object.entries(work.windows)];
  $("window").replaceChildren(...presets.map(([text], at) => new Option(text, at)));
  setWindow(scan.window);
  if (!work.labels.some((one) => one.label === active)) active = work.labels[0].label;
  lists();
  draw();
  return scan.read_only ? "read-only: another tab works on this scan" : `${name}, ready`;
});

const change = (path, content, text) => act(text, async () => {
  const reply = await ask(path, { label: active, ...content });
  scan.objects = reply.objects;
  if (reply.part) forget(reply.part);
  lists();
  draw();
  if (path === "undo" && !reply.done) return "nothing to undo";
  const object = scan.objects.find((one) => one.label === active);
  const more = object && object.more ? "; it may reach further: Continue (g)" : "";
  const empty = object && !object.voxels ? "nothing found" : "saved";
  return `${empty}${reply.seconds === undefined ? "" : `, ${reply.seconds} s`}${more}`;
});

function click(place, inside) {
  if (!scan || scan.read_only || !inScan(place)) return;
  if (!work.points) return say("this model takes boxes, no clicks: press b", true);
  change("mark", { voxel: place, inside }, "computing");
}

const add = () => act("adding", async () => {
  const reply = await ask("label", {});
  work = { ...work, ...reply };
  active = reply.label;
  lists();
  draw();
  return "new object";
});

const setState = (state) => act("saving", async () => {
  work = { ...work, ...await ask("state", { state }) };
  lists();
  return `${scan.scan} is ${state}`;
});

async function doneAndNext() {
  await setState("done");
  const next = work.scans.find((one) => one.state === "open");
  if (next) open(next.name);
}

const save = () => act("saving", async () => `saved as labels/${(await ask("save", {})).saved}`);

function setWindow([low, high]) {
  view.window = [low, Math.max(high, low + 1e-3)];
  $("limits").textContent = view.window.map((value) => +value.toPrecision(4)).join(" to ");
  draw();
}

function scroll(axis, step) {
  view.place[axis] = Math.max(0, Math.min(scan.shape[axis] - 1, view.place[axis] + step));
  draw();
}

function zoom(axis, factor) {
  view.zoom[axis] = Math.max(0.5, Math.min(20, view.zoom[axis] * factor));
  draw();
}

// ---------------------------------------------------------------- mouse and keyboard

function position(event) {
  const canvas = event.target, ratio = canvas.width / canvas.clientWidth;
  return [event.offsetX * ratio, event.offsetY * ratio];
}

for (const canvas of canvases) {
  const axis = +canvas.dataset.axis;
  canvas.addEventListener("focus", () => { last = axis; });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (!scan) return;
    if (event.ctrlKey) zoom(axis, event.deltaY < 0 ? 1.15 : 1 / 1.15);
    else scroll(axis, event.deltaY < 0 ? 1 : -1);
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    if (!scan) return;
    canvas.focus();
    canvas.setPointerCapture(event.pointerId);
    const [x, y] = position(event);
    const kind = event.button === 1 ? "pan" : event.shiftKey ? "window"
      : event.altKey ? "place" : boxing && event.button === 0 ? "box" : "click";
    drag = { kind, axis, x, y, toX: x, toY: y, button: event.button,
             window: [...view.window], pan: [...view.pan[axis]] };
    if (kind === "place") goTo(toVoxel(axis, x, y));
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag || drag.axis !== axis) return;
    const [x, y] = position(event);
    drag.toX = x;
    drag.toY = y;
    const [dx, dy] = [x - drag.x, y - drag.y];
    if (drag.kind === "pan") view.pan[axis] = [drag.pan[0] + dx, drag.pan[1] + dy];
    if (drag.kind === "place") goTo(toVoxel(axis, x, y));
    if (drag.kind === "window") {
      const [low, high] = drag.window, width = high - low;
      const level = (low + high) / 2 + dy * width / 400, wide = width * Math.exp(dx / 300);
      setWindow([level - wide / 2, level + wide / 2]);
    }
    draw();
  });
  canvas.addEventListener("pointerup", () => {
    const done = drag;
    drag = null;
    if (!done || done.axis !== axis) return;
    const from = toVoxel(axis, done.x, done.y), to = toVoxel(axis, done.toX, done.toY);
    if (done.kind === "click" && done.button !== 1) {
      if (inScan(from)) view.place = from;
      click(from, done.button === 0);
    } else if (done.kind === "box") {
      boxing = false;
      const clip = (place) => place.map((v, at) => Math.max(0, Math.min(scan.shape[at] - 1, v)));
      if (!scan.read_only) change("mark", { box: [clip(from), clip(to)], inside: true }, "computing");
    }
    draw();
  });
}

function goTo(place) {
  if (inScan(place)) { view.place = place; draw(); }
}

function step(columns, rows) { // move the cross on the plane that was used last
  const [a, b] = ACROSS[last], place = [...view.place];
  place[a] += columns;
  place[b] += b === 2 ? -rows : rows;
  goTo(place);
}

const toggle = (id) => { $(id).checked = !$(id).checked; draw(); };
const nextWindow = () => {
  $("window").selectedIndex = ($("window").selectedIndex + 1) % presets.length;
  setWindow(presets[$("window").value][1]);
};
const KEYS = {
  ArrowUp: () => scroll(last, 1), ArrowDown: () => scroll(last, -1),
  PageUp: () => scroll(last, 10), PageDown: () => scroll(last, -10),
  "+": () => zoom(last, 1.25), "=": () => zoom(last, 1.25), "-": () => zoom(last, 0.8),
  h: () => step(-1, 0), l: () => step(1, 0), k: () => step(0, -1), j: () => step(0, 1),
  H: () => step(-10, 0), L: () => step(10, 0), K: () => step(0, -10), J: () => step(0, 10),
  Enter: () => click(view.place, true), x: () => click(view.place, false),
  b: () => $("box").click(), z: () => $("undo").click(), g: () => $("more").click(),
  n: add, s: save, d: doneAndNext, w: nextWindow, f: () => toggle("fill"),
  Escape: () => { boxing = false; drag = null; lists(); draw(); },
};

addEventListener("keydown", (event) => {
  if (event.target.matches("input[type=text], select") || event.metaKey || event.altKey) return;
  if (event.ctrlKey && event.key !== "z") return;
  if (/^[1-9]$/.test(event.key) && work && work.labels[event.key - 1]) {
    return choose(work.labels[event.key - 1].label);
  }
  if (!KEYS[event.key] || !scan || (event.key === "Enter" && event.target.matches("button"))) return;
  event.preventDefault();
  KEYS[event.key]();
});

$("box").addEventListener("click", () => { boxing = !boxing; lists(); });
$("undo").addEventListener("click", () => change("undo", {}, "undoing"));
$("more").addEventListener("click", () => change("finish", {}, "computing"));
$("clear").addEventListener("click", () => change("remove", {}, "removing"));
$("add").addEventListener("click", add);
$("save").addEventListener("click", save);
$("window").addEventListener("change", () => setWindow(presets[$("window").value][1]));
for (const id of ["fill", "dots"]) $(id).addEventListener("change", draw);
for (const button of document.querySelectorAll("[data-state]")) {
  button.addEventListener("click", () => setState(button.dataset.state));
}
addEventListener("resize", draw);
setInterval(() => {
  if (scan && !scan.read_only) ask("alive", {}).catch((error) => say(error.message, true));
}, 8000);

(async () => {
  try {
    work = await ask("work");
    lists();
    const before = sessionStorage.getItem("scan");
    const first = work.scans.find((one) => one.name === before)
      || work.scans.find((one) => one.state === "open") || work.scans[0];
    await open(first.name);
  } catch (error) {
    say(error.message, true);
  }
})();

// What moves on the page; runs once for every part that shows results. `element` is its root, `trigger` tells the
// server. Listeners hang on the root, so that they outlive what is shown in it.

let timer = null;

function stop() {
  clearInterval(timer);
  timer = null;
  const button = element.querySelector(".da-play");
  if (button) {
    button.textContent = "Play";
    button.setAttribute("aria-pressed", "false");
  }
}

function wipe(range) {
  range.closest("figure").querySelector(".da-wipe").style.setProperty("--at", range.value + "%");
}

function wipeAt(box, clientX) {
  const side = box.getBoundingClientRect();
  const range = box.closest("figure").querySelector(".da-wipe-at");
  range.value = Math.round((100 * (clientX - side.left)) / side.width);
  wipe(range);
}

function show(player, number) {
  const at = player.querySelector(".da-at");
  const count = Number(at.max) + 1;
  const frame = ((number % count) + count) % count;
  at.value = frame;
  for (const frames of player.querySelectorAll(".da-frames")) {
    const images = [...frames.children];
    images.forEach((image, place) => (image.hidden = place !== Math.min(frame, images.length - 1)));
  }
  player.querySelector(".da-number").textContent = `frame ${frame + 1} of ${count}`;
  at.setAttribute("aria-valuetext", `frame ${frame + 1} of ${count}`);
}

function play(player) {
  const running = timer !== null;
  stop();
  if (running) return;
  const button = player.querySelector(".da-play");
  button.textContent = "Pause";
  button.setAttribute("aria-pressed", "true");
  timer = setInterval(() => {
    if (!player.isConnected) return stop();
    show(player, Number(player.querySelector(".da-at").value) + 1);
  }, 1000 / Math.max(1, Number(player.dataset.rate)));
}

function choose(map, row, column) {
  const { rows, columns } = map.dataset;
  const within = (value, count) => Math.max(0, Math.min(Number(count) - 1, value));
  trigger("select", { row: within(row, rows), column: within(column, columns) });
}

element.addEventListener("input", (event) => {
  if (event.target.matches(".da-wipe-at")) wipe(event.target);
  if (event.target.matches(".da-at")) {
    stop();
    show(event.target.closest(".da-player"), Number(event.target.value));
  }
});

element.addEventListener("pointerdown", (event) => {
  const box = event.target.closest(".da-wipe");
  if (box) {
    box.setPointerCapture(event.pointerId);
    wipeAt(box, event.clientX);
  }
});

element.addEventListener("pointermove", (event) => {
  const box = event.target.closest(".da-wipe");
  if (box && event.buttons) wipeAt(box, event.clientX);
});

element.addEventListener("click", (event) => {
  const player = event.target.closest(".da-player");
  if (event.target.matches(".da-play")) play(player);
  if (event.target.matches(".da-step")) {
    stop();
    show(player, Number(player.querySelector(".da-at").value) + Number(event.target.dataset.by));
  }
  const map = event.target.closest(".da-map");
  if (map) {
    const side = map.getBoundingClientRect();
    const row = Math.floor(((event.clientY - side.top) / side.height) * Number(map.dataset.rows));
    choose(map, row, Math.floor(((event.clientX - side.left) / side.width) * Number(map.dataset.columns)));
  }
  const point = event.target.closest(".da-point");
  if (point) trigger("select", { setting: point.dataset.setting });
});

element.addEventListener("keydown", (event) => {
  const point = event.target.closest(".da-point");
  if (point && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    trigger("select", { setting: point.dataset.setting });
  }
  const map = event.target.closest(".da-map");
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (map && moves[event.key]) {
    event.preventDefault();
    const [down, right] = moves[event.key];
    choose(map, Number(map.dataset.row) + down, Number(map.dataset.column) + right);
  }
});

// A new map takes the place of the one that had the keyboard.
let hadKeyboard = false;
element.addEventListener("focusin", (event) => (hadKeyboard = event.target.matches(".da-map")));
element.addEventListener("focusout", (event) => {
  if (event.relatedTarget) hadKeyboard = false;
});
watch("value", () => {
  stop();
  const map = element.querySelector(".da-map");
  if (map && hadKeyboard) map.focus({ preventScroll: true });
});

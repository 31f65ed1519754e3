// White strokes on black, as MNIST has them; what is sent is the canvas as a PNG.
const canvas = element.querySelector(".canvas"), pen = canvas.getContext("2d");
const WIDTH = 22, PACE = 6;
let at = [140, 140], drawing = false;
const changed = () => { props.value = canvas.toDataURL("image/png"); };
const clear = () => {
  pen.fillStyle = "black";
  pen.fillRect(0, 0, canvas.width, canvas.height);
};
const place = (event) => {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
};
const line = (to) => {
  pen.strokeStyle = "white";
  pen.lineWidth = WIDTH;
  pen.lineCap = "round";
  pen.beginPath();
  pen.moveTo(...at);
  pen.lineTo(...to);
  pen.stroke();
  at = to;
};
const showPen = () => {
  const mark = element.querySelector(".pen"), box = canvas.getBoundingClientRect();
  mark.hidden = false;
  mark.style.left = `${at[0] * box.width / canvas.width}px`;
  mark.style.top = `${at[1] * box.height / canvas.height}px`;
};
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  drawing = true;
  at = place(event);
  line(at);
});
canvas.addEventListener("pointermove", (event) => { if (drawing) line(place(event)); });
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => { drawing = false; changed(); });
}
canvas.addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }, move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  const to = at.map((value, index) => Math.max(0, Math.min(280, value + PACE * move[index])));
  if (event.shiftKey) { line(to); changed(); } else at = to;
  showPen();
});
element.querySelector(".clear").addEventListener("click", () => { clear(); props.value = null; });
element.querySelector(".invert").addEventListener("click", () => {
  pen.globalCompositeOperation = "difference";
  pen.fillStyle = "white";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.globalCompositeOperation = "source-over";
  changed();
});
element.querySelector(".file").addEventListener("change", async (event) => {
  const file = event.target.files[0];
  if (!file) return;
  event.target.value = "";  // so that it can be chosen again
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    alert(`${file.name} could not be read as a picture`);
    return;
  }
  clear();
  const scale = Math.min(canvas.width / picture.width, canvas.height / picture.height);
  const [width, height] = [picture.width * scale, picture.height * scale];
  pen.drawImage(picture, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
  changed();
});
clear();

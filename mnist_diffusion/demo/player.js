// The player of a film: noisy samples and predicted images at a step, which a slider chooses.
const find = (name) => element.querySelector(`.${name}`);
const frames = () => props.value?.frames ?? [];
const show = () => {
  const film = props.value, frame = frames()[find("place").value - 1];
  for (const kind of ["noisy", "clean"]) {
    find(kind).src = frame[kind];
    find(kind).alt = film.about;
    find(kind).style.width = `min(100%, ${Math.max(12, 4 * film.columns)}rem)`;
  }
  find("caption").textContent = frame.caption;
  find("png").href = frame.clean;
  find("png").download = `${film.file}.png`;
};
const follow = () => {
  const film = props.value, place = find("place"), said = find("said");
  find("film").hidden = !frames().length;
  said.textContent = frames().length ? (film.animation ? "Done." : "") : "Nothing drawn yet.";
  if (!frames().length) return;
  place.value = place.max = frames().length;
  find("gif").hidden = !film.animation;
  find("gif").href = film.animation ?? "";
  find("gif").download = `${film.file}.gif`;
  show();
};
find("place").addEventListener("input", show);
watch("value", follow);
follow();

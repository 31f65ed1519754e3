// The player of a film: noisy samples and predicted images at a step, which a slider chooses.
const find = (name) => element.querySelector(`.${name}`);
const show = () => {
  const film = props.value, frames = film?.frames ?? [];
  find("film").hidden = !frames.length;
  find("nothing").hidden = frames.length > 0;
  if (!frames.length) return;
  const place = find("place"), frame = frames[place.value];
  for (const kind of ["noisy", "clean"]) {
    find(kind).src = frame[kind];
    find(kind).alt = `${film.about}. ${frame.caption}`;
    find(kind).style.width = `min(100%, ${Math.max(12, 4 * film.columns)}rem)`;
  }
  find("caption").textContent = frame.caption;
  find("png").href = frame.clean;
  find("png").download = `${film.file}.png`;
  find("gif").hidden = !film.animation;
  find("gif").href = film.animation ?? "";
  find("gif").download = `${film.file}.gif`;
};
const follow = () => {
  const place = find("place"), last = (props.value?.frames ?? []).length - 1;
  place.max = Math.max(0, last);
  place.value = last;
  show();
};
find("place").addEventListener("input", show);
watch("value", follow);
follow();

import { element } from "./page.js";

/**
 * Shows `pictures` ({src, title}) in a dialog, number `at` first; the arrow keys turn over, a click or Escape closes.
 * `below(picture, dialog)` gives what stands under one: by default its title. The dialog, which is returned, becomes a
 * child of `host`, whose stylesheet imports full_size.css.
 */
export function showFullSize(host, pictures, at, below = ({ title }) => [element("div", { textContent: title })]) {
  const image = element("img");
  const dialog = element("dialog", { className: "ti-full-size", tabIndex: -1 });
  const turnTo = (next) => {
    if (!pictures[next]) return;
    at = next;
    image.src = pictures[at].src;
    image.alt = pictures[at].title;
    dialog.replaceChildren(image, ...below(pictures[at], dialog));
  };
  turnTo(at);
  dialog.onclick = ({ target }) => [dialog, image].includes(target) && dialog.close();
  dialog.onclose = () => dialog.remove();
  dialog.onwheel = (event) => event.stopPropagation(); // otherwise the canvas behind it zooms
  dialog.onkeydown = (event) => {
    event.stopPropagation(); // otherwise ComfyUI's shortcuts react to it
    if (event.target.matches("textarea, input")) return;
    if (event.key === "ArrowLeft") turnTo(at - 1);
    if (event.key === "ArrowRight") turnTo(at + 1);
  };
  host.append(dialog);
  dialog.showModal();
  dialog.focus(); // and not what can be edited below the picture
  return dialog;
}

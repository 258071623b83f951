/** Creates an HTML element with these properties and children. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** `text` with every {name} replaced by its value. */
export function filled(text, values) {
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Wraps the method `name` of a node or widget so that `more` runs after it, with the same arguments. */
export function after(object, name, more) {
  const first = object[name];
  object[name] = function (...values) {
    const result = first?.apply(this, values);
    more(...values);
    return result;
  };
}

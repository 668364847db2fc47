"use strict";
// Draws the plots, and filters the galleries, of this page.

const style = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Bokeh draws on a canvas, which has no colours of the page's own.
function dress(figures) {
  const [text, soft, line] = ["--text", "--soft", "--line"].map(style);
  for (const figure of figures) {
    for (const axis of [...figure.left, ...figure.below]) {
      axis.axis_label_text_color = text;
      axis.axis_label_text_font_style = "normal";
      axis.major_label_text_color = text;
      axis.axis_line_color = soft;
      axis.major_tick_line_color = soft;
      axis.minor_tick_line_color = null;
    }
    for (const grid of figure.center) {
      if ("grid_line_color" in grid) grid.grid_line_color = line;
    }
  }
}

function setPressed(button, pressed) {
  button.setAttribute("aria-pressed", String(pressed));
}

const isPressed = (button) => button.getAttribute("aria-pressed") === "true";

function addButtons(plot, column, [linear, log]) {
  const scale = plot.querySelector("button.scale");
  scale.addEventListener("click", () => {
    setPressed(scale, !isPressed(scale));
    column.children = [isPressed(scale) ? log : linear];
  });
  plot.querySelectorAll("button.line").forEach((button, index) => {
    button.addEventListener("click", () => {
      setPressed(button, !isPressed(button));
      for (const renderer of [...linear.renderers, ...log.renderers]) {
        if (renderer.tags[0] === index) renderer.visible = isPressed(button);
      }
    });
  });
  for (const button of plot.querySelectorAll("button")) button.hidden = false;
}

async function draw(plot) {
  const item = JSON.parse(plot.querySelector("script").textContent);
  const views = await Bokeh.embed.embed_item(item, plot.querySelector(".drawing"));
  const column = views.roots[0].model;
  const figures = [column.children[0], column.tags[0]];
  dress(figures);
  addButtons(plot, column, figures);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dress(figures));
}

function filter(gallery, kind, name) {
  const images = [...gallery.querySelectorAll(".pair")];
  const has = (image, key, wanted) =>
    !wanted || (image.dataset[key] || "").split(" ").includes(wanted);
  for (const image of images) {
    image.hidden = !(has(image, "errors", kind) && has(image, "classes", name));
  }
  const shown = images.filter((image) => !image.hidden).length;
  gallery.querySelector("output").textContent = `${shown} of ${images.length} images`;
}

function addFilters(gallery) {
  const filters = gallery.querySelector(".filters");
  if (!filters) return;
  const buttons = [...filters.querySelectorAll("button")];
  const select = filters.querySelector("select");
  const update = () => {
    const pressed = buttons.find(isPressed);
    filter(gallery, pressed?.dataset.index ?? "", select?.value ?? "");
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) setPressed(other, other === button);
      update();
    });
  }
  select?.addEventListener("change", update);
  filters.hidden = false;
  update();
}

if (globalThis.Bokeh) Bokeh.set_log_level("warn");
document.querySelectorAll(".plot").forEach(draw);
document.querySelectorAll(".gallery").forEach(addFilters);

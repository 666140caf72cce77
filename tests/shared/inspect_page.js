// Asked of a page by chromium.py, inside the browser: what would a reader stumble over?
window.inspectPage = (() => {
  const REQUIRED_CONTRAST = 4.5;  // WCAG 2.2 AA, text of normal size

  function luminance(colour) {
    const [r, g, b] = colour.match(/[\d.]+/g).slice(0, 3).map((v) => {
      const share = v / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  function background(element) {
    for (let node = element; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (colour && !/rgba\(.*, 0\)|transparent/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  }

  function hasText(element) {
    return [...element.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim());
  }

  function visible(element) {
    return element.checkVisibility() && !element.closest(".hidden");
  }

  function contrasts() {
    const found = new Set();
    for (const element of document.querySelectorAll("main *")) {
      if (!hasText(element) || !visible(element)) continue;
      const isSvg = element instanceof SVGElement;
      const style = getComputedStyle(element);
      const text = luminance(isSvg ? style.fill : style.color);
      const paper = luminance(background(isSvg ? element.closest("div") : element));
      const ratio = (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05);
      if (ratio < REQUIRED_CONTRAST) {
        found.add(`contrast ${ratio.toFixed(2)} of "${element.textContent.trim().slice(0, 40)}"`);
      }
    }
    return [...found];
  }

  function overflows() {
    const width = document.documentElement.clientWidth;
    const found = [];
    if (document.documentElement.scrollWidth > width) found.push(`the page is ${document.documentElement.scrollWidth} px wide`);
    for (const element of document.querySelectorAll("main *")) {
      // A figure hides what leaves its frame; cutOff() looks for text there.
      if (!visible(element) || element.closest(".scroll *, .plot *, .hidden")) continue;
      const box = element.getBoundingClientRect();
      if (box.width && (box.right > width + 1 || box.left < -1)) {
        found.push(`${element.tagName} "${element.textContent.trim().slice(0, 40)}" spans ${Math.round(box.left)} to ${Math.round(box.right)} px of ${width}`);
      }
    }
    return found;
  }

  // Text of a figure that its own frame cuts off.
  function cutOff() {
    const found = [];
    for (const plot of document.querySelectorAll(".plot")) {
      const frame = plot.getBoundingClientRect();
      for (const text of plot.querySelectorAll("svg text")) {
        const box = text.getBoundingClientRect();
        if (box.width && (box.left < frame.left - 1 || box.right > frame.right + 1)) {
          found.push(`"${text.textContent}" is cut off in the figure "${plot.id}"`);
        }
      }
    }
    return found;
  }

  async function pictures() {
    const found = [];
    for (const image of document.images) {
      await image.decode().catch(() => found.push(`picture "${image.alt}" cannot be decoded`));
      if (!image.alt.trim()) found.push(`a picture without alternative text: ${image.src.slice(0, 40)}`);
    }
    return found;
  }

  return {
    numFigures: () =>
      [...document.querySelectorAll(".js-plotly-plot")].filter((plot) =>
        plot.querySelector(".scatterlayer path.js-line, .scatterlayer path.point, .barlayer .point path, .heatmaplayer image")
      ).length,
    complaints: async () => {
      for (const details of document.querySelectorAll("details")) details.open = true;
      const found = [...contrasts(), ...overflows(), ...cutOff(), ...(await pictures())];
      for (const details of document.querySelectorAll("details")) details.open = false;
      return found;
    },
  };
})();

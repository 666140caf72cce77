// Draws the figures of the page in the reader's colour scheme, and again when that changes.
(async () => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = Object.keys(figures).map((id) => document.getElementById(id)).filter(Boolean);
  const config = { responsive: true, displayModeBar: false };
  const coarse = matchMedia("(pointer: coarse)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

  async function loadPlotly() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(unpacked).text();
    document.head.append(script);
  }

  // "var(--name)" becomes the variable's present value: plotly.js draws on its own and cannot look it up.
  function resolved(value, style) {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => resolved(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, style)]));
    }
    return value;
  }

  async function draw() {
    const scheme = dark.matches ? "dark" : "light";
    const style = getComputedStyle(root);
    for (const plot of plots) {
      const { data, layout } = resolved(figures[plot.id], style);
      // On a touch screen a drag over a curve must scroll the page.
      await Plotly.react(plot, data, { ...layout, dragmode: coarse.matches ? false : "zoom" }, config);
    }
    root.dataset.scheme = scheme;
  }

  try {
    await loadPlotly();
    await draw();
    dark.addEventListener("change", draw);
    root.dataset.figures = "drawn";
  } catch (error) {
    root.dataset.figures = "failed";
    for (const plot of plots) {
      plot.classList.add("failed");
      plot.textContent = `This figure could not be drawn: ${error.message}`;
    }
    throw error;
  }
})();

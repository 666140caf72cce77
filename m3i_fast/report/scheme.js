// Where nothing is drawn by script: the page follows the colour scheme by itself; this says so to who checks it.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const tell = () => { root.dataset.scheme = dark.matches ? "dark" : "light"; };
  dark.addEventListener("change", tell);
  tell();
  root.dataset.figures = "drawn";
})();

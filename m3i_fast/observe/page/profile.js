// The bars are of HTML and follow the colour scheme by themselves; this says so to who checks the page.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const tell = () => { root.dataset.scheme = dark.matches ? "dark" : "light"; };
  dark.addEventListener("change", tell);
  tell();
  root.dataset.figures = "drawn";
})();

// The colours before anything is drawn: what was chosen here, else what the system prefers.
(() => {
  const root = document.documentElement;
  const chosen = () => { try { return localStorage.getItem("baton-theme"); } catch { return null; } };
  const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;
  if (chosen()) root.dataset.theme = chosen();
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const now = root.dataset.theme ?? (dark() ? "dark" : "light");
      root.dataset.theme = now === "dark" ? "light" : "dark";
      try { localStorage.setItem("baton-theme", root.dataset.theme); } catch { /* kept for this page alone */ }
    });
  });
})();

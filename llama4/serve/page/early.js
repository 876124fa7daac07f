// The colours that were chosen, before anything is drawn.
try {
  const theme = JSON.parse(localStorage.getItem("llama4.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // storage is forbidden: the system's colours
}

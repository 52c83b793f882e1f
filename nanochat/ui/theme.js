// Before anything is drawn, so that nothing flashes up in the other theme.
try {
  const theme = JSON.parse(localStorage.getItem("nanochat.theme"));
  if (theme) document.documentElement.dataset.theme = theme;
} catch { /* the browser keeps nothing */ }

// Neurons under PM2: `pm2 start deploy/neurons/ecosystem.config.js --only condense-miner`, then `pm2 save`.
// Settings come from miner.env, validator.env and gateway.env beside this file (.env.example says which there are).
// The commands are those of PATH, or of the folder CONDENSE_BIN, such as /opt/condense/bin.
const fs = require("fs");
const path = require("path");

// Lines of NAME=VALUE, as Docker and systemd read them.
function settings(file) {
  if (!fs.existsSync(file)) return {};
  const lines = fs.readFileSync(file, "utf8").split("\n").map((line) => line.trim());
  const set = lines.filter((line) => line && !line.startsWith("#") && line.includes("="));
  return Object.fromEntries(set.map((line) => [line.slice(0, line.indexOf("=")), line.slice(line.indexOf("=") + 1)]));
}

// seconds: that it may take to end what it has accepted. PM2 asks with SIGINT first and kills it behind them.
function neuron(kind, seconds) {
  const env = settings(path.join(__dirname, `${kind}.env`));
  return {
    name: `condense-${kind}`,
    script: path.join(process.env.CONDENSE_BIN || "", `condense-${kind}`),
    interpreter: "none",
    args: env.OPTIONS || "",
    env,
    autorestart: true,
    max_restarts: 20,
    min_uptime: "60s", // one that ends sooner did not start: its last line says why
    exp_backoff_restart_delay: 1000, // milliseconds at first
    kill_timeout: 1000 * seconds,
    merge_logs: true,
  };
}

module.exports = { apps: [neuron("miner", 45), neuron("validator", 300), neuron("gateway", 45)] };

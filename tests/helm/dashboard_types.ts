// Grafana's own types, as JSON has them: what an enumeration is in TypeScript is one of its strings there. A literal that
// is declared as one of these may have no field that Grafana does not know.
import type { Dashboard, VariableModel } from "@grafana/schema";
import type * as StatPanel from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen.d.ts";
import type * as TimeSeriesPanel from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen.d.ts";

type Plain<T> = T extends string
  ? `${T}`
  : T extends number | boolean | null | undefined
    ? T
    : T extends (infer Item)[]
      ? Plain<Item>[]
      : T extends object
        ? { [Key in keyof T]: Plain<T[Key]> }
        : T;

// The generator gives every variable an id, and the fields that those of kind `interval` have.
type Variable = Plain<VariableModel> & { id: string; auto: false; auto_count: number; auto_min: string };

// `style` is from before Grafana 11, which takes no notice of it.
export type ADashboard = Omit<Plain<Dashboard>, "templating"> & { templating: { list: Variable[] }; style: "dark" };
// Grafana adds the defaults of a panel's plugin.
export type Options = { stat: Partial<Plain<StatPanel.Options>>; timeseries: Partial<Plain<TimeSeriesPanel.Options>> };
export type Custom = { stat: Record<string, never>; timeseries: Plain<TimeSeriesPanel.FieldConfig> };

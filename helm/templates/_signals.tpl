{{/* What tells that a pool is too small or too large, as queries to Prometheus; KEDA asks them itself, a HorizontalPodAutoscaler reads them
as recording rules. A query without samples answers 0, not nothing.

Requests wait in the routers' queue for a prefill worker's credit and a decode worker's blocks, so the wait speaks of both; blocks in use and
the time between tokens speak of decode alone, computed prompt tokens of prefill alone. */}}

{{/* (dict "root" $ "name" pool "pool" settings): a JSON list of {name, query, target, average}. `average` targets are per worker. */}}
{{- define "baton.signals" -}}
{{- $release := include "baton.series" .root -}}
{{- $pool := printf "%s,pool=%q" $release .name -}}
{{- $window := .root.Values.autoscaling.window -}}
{{- $targets := mergeOverwrite (deepCopy (index .root.Values.autoscaling.signals .pool.role)) (deepCopy .pool.autoscaling.signals) -}}
{{- $known := list
    (dict "key" "queueWaitSeconds" "name" "queue_wait_seconds" "average" false
      "query" (printf "histogram_quantile(0.95, sum by (le) (rate(baton_router_queue_seconds_bucket{%s}[%s]))) >= 0 or vector(0)" $release $window))
    (dict "key" "waitingRequests" "name" "waiting_requests" "average" true
      "query" (printf "sum(baton_router_queue_depth{%s}) or vector(0)" $release))
    (dict "key" "uncachedTokensPerSecond" "name" "uncached_tokens_per_second" "average" true
      "query" (printf "sum(rate(baton_batch_tokens_sum{%s,kind=\"prefill\"}[%s])) or vector(0)" $pool $window))
    (dict "key" "kvBlocksShare" "name" "kv_blocks_share" "average" false
      "query" (printf "1 - sum(baton_kv_blocks{%s,state=~\"free|cached\"}) / sum(baton_kv_blocks{%s}) or vector(0)" $pool $pool))
    (dict "key" "interTokenSeconds" "name" "inter_token_seconds" "average" false
      "query" (printf "histogram_quantile(0.95, sum by (le) (rate(baton_inter_token_latency_seconds_bucket{%s}[%s]))) >= 0 or vector(0)" $release $window)) -}}
{{- $wanted := list -}}
{{- range $signal := $known -}}
{{- $target := get $targets $signal.key -}}
{{- if $target -}}
{{- $wanted = append $wanted (set $signal "target" $target) -}}
{{- end -}}
{{- end -}}
{{- toJson $wanted -}}
{{- end -}}

{{/* The series of this release. */}}
{{- define "baton.series" -}}
{{- printf "namespace=%q,release=%q" .Release.Namespace .Release.Name -}}
{{- end -}}

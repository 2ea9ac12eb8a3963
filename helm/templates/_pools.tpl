{{/* Pools of workers. A pool is what .Values.workers says, overridden by its own settings. */}}

{{/* Every pool by name, as JSON. What names one thing of several is replaced whole. */}}
{{- define "baton.pools" -}}
{{- $pools := dict -}}
{{- range $name, $own := .Values.pools -}}
{{- $pool := mergeOverwrite (deepCopy $.Values.workers) (deepCopy $own) -}}
{{- range $whole := list "disruptionBudget" "modelVolume" -}}
{{- if hasKey $own $whole }}{{ $_ := set $pool $whole (index $own $whole) }}{{ end -}}
{{- end -}}
{{- $_ := set $pools $name $pool -}}
{{- end -}}
{{- toJson $pools -}}
{{- end -}}

{{/* (dict "root" $ "pool" settings): "true" if its number of workers is not ours to set. */}}
{{- define "baton.autoscaled" -}}
{{- if and (ne .root.Values.autoscaling.kind "none") .pool.autoscaling.enabled }}true{{ end -}}
{{- end -}}

{{/* Workers that there should be, by role, as JSON; nothing of a role with a pool whose size an autoscaler decides. */}}
{{- define "baton.desired" -}}
{{- $desired := dict -}}
{{- range $name, $pool := include "baton.pools" . | fromJson -}}
{{- $before := index $desired $pool.role | default 0 -}}
{{- $known := and (not (include "baton.autoscaled" (dict "root" $ "pool" $pool))) (ge (int $before) 0) -}}
{{- $_ := set $desired $pool.role (ternary (add (int $before) (int $pool.replicas)) -1 $known) -}}
{{- end -}}
{{- range $role, $count := $desired }}{{ if lt (int $count) 0 }}{{ $_ := unset $desired $role }}{{ end }}{{ end -}}
{{- toJson $desired -}}
{{- end -}}

{{/* "true" if a pool may have no worker. The gateways must take requests even then: they wait in the routers' queue, and that is what
wakes the pool. */}}
{{- define "baton.mayBeEmpty" -}}
{{- range $name, $pool := include "baton.pools" . | fromJson -}}
{{- if include "baton.autoscaled" (dict "root" $ "pool" $pool) -}}
{{- if not $pool.autoscaling.minReplicas }}true{{ end -}}
{{- else if not $pool.replicas }}true{{ end -}}
{{- end -}}
{{- end -}}

{{- define "baton.poolResources" -}}
{{- $resources := deepCopy .resources -}}
{{- $devices := dict -}}
{{- if .gpus }}{{ $_ := set $devices "nvidia.com/gpu" .gpus }}{{ end -}}
{{- if .rdma.resource }}{{ $_ := set $devices .rdma.resource .rdma.count }}{{ end -}}
{{- if $devices }}{{ $_ := set $resources "limits" (merge $devices ($resources.limits | default dict)) }}{{ end -}}
{{- toYaml $resources -}}
{{- end -}}

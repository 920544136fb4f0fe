{{- define "several" -}}
{{- if or .Values.autoscaling.enabled (gt (int .Values.replicas) 1) }}true{{ end -}}
{{- end -}}
{{- define "labels" -}}
app.kubernetes.io/name: latentwire
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}
{{- define "metadata" -}}
name: {{ .root.Release.Name }}{{ ne .component "service" | ternary (printf "-%s" .component) "" }}
labels:
  {{- include "labels" . | nindent 2 }}
{{- end -}}
{{- define "container security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
{{- define "models" -}}
accessModes: [ReadWriteOnce]
{{- with .Values.models.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests: {storage: {{ .Values.models.storage }}}
{{- end -}}
